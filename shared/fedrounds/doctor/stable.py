"""Compositions that overflow or vanish on the way, computed in the form that doesn't.

log(softmax(x)), log(sigmoid(x)), log(1 - sigmoid(x)), log(sum(exp(x))) and exp(x) / sum(exp(x)) are
finite, and have gradients, where their parts aren't or don't. Each part's result is remembered by
what it was made of; where a whole is asked for, it is made anew from that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Form:
    """A tensor is `kind` of `source`; `picks` are what was done to it since, one after another."""

    kind: str
    source: Tensor
    dim: int | None = None
    keeps_dim: bool = False
    picks: tuple[Callable[[Tensor], Tensor], ...] = field(default=())


class Forms:
    """Remembers what the tensors of one computation are made of, and holds them as long."""

    def __init__(self) -> None:
        self._forms: dict[int, tuple[Tensor, _Form]] = {}

    def rewritten(self, name: str, positional: Sequence[Any]) -> Tensor | None:
        """Return the stable form of a whole, None if the call is none that has one."""
        form = self._form_of(positional[0])
        if form is None:
            return None
        if name == "log":
            found = _LOGARITHMS[form.kind](form)
            for pick in form.picks:
                found = pick(found)
            return found
        if name in _DIVISIONS and len(positional) > 1:
            below = self._form_of(positional[1])
            is_softmax = (
                form.kind == "exp"
                and below is not None
                and below.kind == "sum-exp"
                and below.source is form.source
                and below.keeps_dim
                and not (form.picks or below.picks)
            )
            if is_softmax and below is not None and below.dim is not None:
                found = form.source.softmax(below.dim)
                self._keep(found, _Form("softmax", form.source, below.dim))
                return found
        return None

    def note(
        self,
        func: Callable[..., Any],
        name: str,
        positional: Sequence[Any],
        named: Mapping[str, Any],
        result: object,
    ) -> None:
        """Remember what a call's result is made of, if that may matter."""
        if not isinstance(result, Tensor):
            return
        source = positional[0]
        form = self._form_of(source)
        dim = named.get("dim", positional[1] if len(positional) > 1 else None)
        if name == "softmax" and isinstance(dim, int):
            self._keep(result, _Form("softmax", source, dim))
        elif name in ("sigmoid", "exp"):
            self._keep(result, _Form(name, source))
        elif form is None:
            return
        elif name == "sum" and form.kind == "exp" and not form.picks and isinstance(dim, int):
            place = positional[2] if len(positional) > 2 else False
            keeps_dim = bool(named.get("keepdim", place))
            self._keep(result, _Form("sum-exp", form.source, dim, keeps_dim))
        elif name in ("__rsub__", "rsub") and form.kind == "sigmoid" and positional[1] == 1:
            self._keep(result, replace(form, source=-form.source))
        elif name in _PICKS:

            def pick(tensor: Tensor) -> Tensor:
                picked = func(tensor, *positional[1:], **named)
                assert isinstance(picked, Tensor)
                return picked

            self._keep(result, replace(form, picks=(*form.picks, pick)))

    def _form_of(self, value: object) -> _Form | None:
        _, form = self._forms.get(id(value), (None, None))
        return form

    def _keep(self, tensor: Tensor, form: _Form) -> None:
        # The tensor is held too: its id must not be given to another.
        self._forms[id(tensor)] = (tensor, form)


def _log_sum_exp(form: _Form) -> Tensor:
    assert form.dim is not None
    return torch.logsumexp(form.source, form.dim, keepdim=form.keeps_dim)


def _log_softmax(form: _Form) -> Tensor:
    assert form.dim is not None
    return F.log_softmax(form.source, form.dim)


_LOGARITHMS: Mapping[str, Callable[[_Form], Tensor]] = {
    "softmax": _log_softmax,
    "sigmoid": lambda form: F.logsigmoid(form.source),
    "exp": lambda form: form.source,
    "sum-exp": _log_sum_exp,
}
_DIVISIONS = ("div", "divide", "true_divide", "__truediv__")
_PICKS = (
    "gather",
    "__getitem__",
    "index_select",
    "select",
    "squeeze",
    "unsqueeze",
    "reshape",
    "view",
    "flatten",
    "transpose",
    "take_along_dim",
    "narrow",
    "masked_select",
)

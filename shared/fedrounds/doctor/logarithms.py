"""Positive tensors known by their logarithms, so that a logarithm of them never overflows.

An exponential, a softmax, a sigmoid or a hyperbolic cosine has a logarithm that is finite where it
is itself too large or too small for its dtype. So have the products, quotients, powers and sums
that are made of these. Where `log` is asked of such a tensor, or two of them are divided, the
result is computed from the logarithms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MakeLog = Callable[[], Tensor | None]
"""Computes a logarithm, None where there turns out to be none: a factor isn't positive."""


@dataclass(frozen=True)
class _Known:
    """A tensor, held so that its id stays its own, its logarithm, and that of 1 minus it."""

    tensor: Tensor
    log: MakeLog
    log_of_complement: MakeLog | None = None


class Logarithms:
    """Remembers the logarithms of the tensors of one computation."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def rewritten(self, name: str, positional: Sequence[Any]) -> Tensor | None:
        """Return a call's result computed from logarithms, None if it has no such form."""
        if name in _LOGS:
            known = self._known.get(id(positional[0]))
            log = None if known is None else known.log()
            return None if log is None else log * _LOGS[name]
        if name == "log1p":
            known = self._known.get(id(positional[0]))
            log = None if known is None else known.log()
            return None if log is None else F.softplus(log)
        if name in _DIVISIONS and len(positional) > 1:
            above, below = (self._known.get(id(value)) for value in positional[:2])
            if above is None or below is None:
                return None
            logs = above.log(), below.log()
            if logs[0] is None or logs[1] is None:
                return None
            log = logs[0] - logs[1]
            result = log.exp()
            self._known[id(result)] = _Known(result, lambda: log)
            return result
        return None

    def note(
        self,
        func: Callable[..., Any],
        name: str,
        positional: Sequence[Any],
        named: Mapping[str, Any],
        result: object,
    ) -> None:
        """Remember the logarithm of a call's result, if that may matter."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        source = positional[0]
        if name in _BEGINNINGS and isinstance(source, Tensor):
            log = _BEGINNINGS[name](source, positional, named)
            complement = _of_sigmoid(-source) if name == "sigmoid" else None
            self._keep(result, log, complement)
            return
        known = [self._known.get(id(value)) for value in positional[:2]]
        if not any(known):
            return
        if name in _PICKS and known[0] is not None:
            self._keep(
                result,
                _picked(func, known[0].log, positional, named),
                None
                if known[0].log_of_complement is None
                else _picked(func, known[0].log_of_complement, positional, named),
            )
        elif name in ("__rsub__", "rsub") and known[0] is not None:
            if positional[1] == 1 and known[0].log_of_complement is not None:
                self._keep(result, known[0].log_of_complement, known[0].log)
        elif name in _REDUCTIONS and known[0] is not None:
            self._keep(result, _reduced(name, known[0].log, positional, named))
        elif name in _POWERS and known[0] is not None:
            exponent = _POWERS[name]
            if exponent is None:
                exponent = named.get("exponent", positional[-1])
            if isinstance(exponent, int | float):
                self._keep(result, _scaled(known[0].log, float(exponent)))
        elif name in _COMBINATIONS and len(positional) > 1 and not named:
            logs = [self._log_of(value) for value in positional[:2]]
            self._keep(result, _combined(_COMBINATIONS[name], logs[0], logs[1]))

    def _keep(self, tensor: Tensor, log: MakeLog, complement: MakeLog | None = None) -> None:
        self._known[id(tensor)] = _Known(tensor, log, complement)

    def _log_of(self, value: object) -> MakeLog:
        """Return the logarithm of a factor or a summand: a known tensor, a positive number."""
        known = self._known.get(id(value))
        if known is not None:
            return known.log
        if isinstance(value, int | float) and value > 0:
            return lambda: torch.tensor(math.log(value))
        if isinstance(value, Tensor) and not value.is_complex():
            return lambda: value.log() if bool((value > 0).all()) else None
        return lambda: None


def _of_exp(source: Tensor, *_: object) -> MakeLog:
    return lambda: source


def _of_sigmoid(source: Tensor, *_: object) -> MakeLog:
    return lambda: F.logsigmoid(source)


def _of_cosh(source: Tensor, *_: object) -> MakeLog:
    return lambda: source.abs() + F.softplus(-2 * source.abs()) - math.log(2)


def _of_exp2(source: Tensor, *_: object) -> MakeLog:
    return lambda: source * math.log(2)


def _of_softmax(source: Tensor, positional: Sequence[Any], named: Mapping[str, Any]) -> MakeLog:
    dim = named.get("dim", positional[1] if len(positional) > 1 else None)
    return lambda: F.log_softmax(source, dim) if isinstance(dim, int) else None


def _picked(
    func: Callable[..., Any], log: MakeLog, positional: Sequence[Any], named: Mapping[str, Any]
) -> MakeLog:
    def pick() -> Tensor | None:
        whole = log()
        if whole is None:
            return None
        picked = func(whole, *positional[1:], **named)
        assert isinstance(picked, Tensor)
        return picked

    return pick


def _scaled(log: MakeLog, factor: float) -> MakeLog:
    def scale() -> Tensor | None:
        unscaled = log()
        return None if unscaled is None else factor * unscaled

    return scale


def _combined(
    combine: Callable[[Tensor, Tensor], Tensor], first: MakeLog, second: MakeLog
) -> MakeLog:
    def make() -> Tensor | None:
        logs = first(), second()
        if logs[0] is None or logs[1] is None:
            return None
        return combine(logs[0], logs[1].to(logs[0].device))

    return make


def _reduced(
    name: str, log: MakeLog, positional: Sequence[Any], named: Mapping[str, Any]
) -> MakeLog:
    """Return the logarithm of a sum or a mean over some dimensions."""
    given = named.get("dim", positional[1] if len(positional) > 1 else None)
    keepdim = bool(named.get("keepdim", positional[2] if len(positional) > 2 else False))

    def make() -> Tensor | None:
        whole = log()
        if whole is None or whole.numel() == 0:
            return None
        dims = (given,) if isinstance(given, int) else tuple(given or range(whole.ndim))
        if not dims:
            return whole
        total = torch.logsumexp(whole, dims, keepdim=keepdim)
        if name == "mean":
            total = total - math.log(math.prod(whole.shape[each] for each in dims))
        return total

    return make


_LOGS = {"log": 1.0, "log2": 1 / math.log(2), "log10": 1 / math.log(10)}
_DIVISIONS = ("div", "divide", "true_divide", "__truediv__")
_REDUCTIONS = ("sum", "mean")
_POWERS: Mapping[str, float | None] = {
    "sqrt": 0.5,
    "rsqrt": -0.5,
    "square": 2.0,
    "reciprocal": -1.0,
    "pow": None,
    "__pow__": None,
}
_BEGINNINGS: Mapping[str, Callable[[Tensor, Sequence[Any], Mapping[str, Any]], MakeLog]] = {
    "exp": _of_exp,
    "exp2": _of_exp2,
    "sigmoid": _of_sigmoid,
    "softmax": _of_softmax,
    "cosh": _of_cosh,
}
_COMBINATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), torch.add),
    **dict.fromkeys(("add", "__add__", "__radd__"), torch.logaddexp),
    **dict.fromkeys(_DIVISIONS, torch.sub),
    **dict.fromkeys(("__rtruediv__", "__rdiv__"), lambda below, above: above - below),
}
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

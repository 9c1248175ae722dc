"""Logarithms, quotients, roots and exponentials kept off what they aren't finite for.

Under `guarding()` what goes into an operation is moved to the nearest place where its value and its
derivative are finite; what is well away from there goes in as it is, so that the result has the
same bits. A moved number has derivative zero: it is off the map, and no gradient can say how to get
back. NaN stays NaN and infinite inputs of sums and products stay infinite: this mends what makes
such values of finite ones, not what passes them on.

Compositions that overflow or vanish on the way are computed in the form that doesn't:
log(softmax(x)), log(sigmoid(x)), log(1 - sigmoid(x)), log(sum(exp(x))) and exp(x) / sum(exp(x)) are
finite, and have gradients, where their parts aren't or don't. Each part's result is remembered by
what it was made of; where a whole is asked for, it is made anew from that.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHARE = 7 / 8


@contextmanager
def guarding() -> Iterator[None]:
    """While active, operations of torch called from Python are guarded as GUARDS says.

    eps is the distance from 1 to the next number of the dtype; the edges are

    - log, log2, log10, sqrt, rsqrt, logit, and powers with fractional exponents: inputs below eps
      become eps (powers above 1: below 0 become 0); log1p: below -1 + eps; acosh: below 1 + eps;
    - quotients and reciprocals: divisors nearer to zero than eps become eps with their sign, plain
      numbers only where they are zero; negative powers likewise, and nearer to zero than what
      keeps the derivative below the dtype's largest number to the power 7/8;
    - exp, exp2, expm1, and powers of a number: results end at the dtype's largest number to the
      power 7/8, so that sums of some of them are finite, too;
    - asin, acos, atanh: within 1 - eps of zero;
    - mean of nothing, std and var of nothing or of one number: 0.

    Norms need no guard: torch gives them derivative 0 at 0. What torch computes inside of one of
    its own functions (cross_entropy, batch_norm) isn't touched.
    """
    with _Guarding():
        yield


class _Guarding(TorchFunctionMode):
    """Changes what goes into the operations in GUARDS, and takes stable forms where there are."""

    def __init__(self) -> None:
        super().__init__()
        self._forms = _Forms()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call one function of torch, guarded."""
        name = getattr(func, "__name__", "").removeprefix("special_")
        positional, named = list(args), dict(kwargs or {})
        if "input" in named:
            positional.insert(0, named.pop("input"))
        if "out" in named or not positional:
            return func(*args, **(kwargs or {}))
        # The name of an operation in place ends with a line.
        plain = name.removesuffix("_") if not name.startswith("__") else name
        if plain != name:
            return self._in_place(func, plain, positional, named)
        stable = self._forms.rewritten(name, positional)
        if stable is not None:
            return stable
        given = tuple(positional)
        if name in _REDUCTIONS:
            return _guard_reduction(func, name, positional, named)
        guard = GUARDS.get(name)
        if guard is not None:
            guard(positional, named)
        result = func(*positional, **named)
        self._forms.note(func, name, given, named, result)
        return result

    def _in_place(
        self, func: Callable[..., Any], name: str, positional: list[Any], named: dict[str, Any]
    ) -> object:
        """Call a function that changes its first argument; `name` is that of its plain form."""
        guard = GUARDS.get(name)
        if guard is None:
            return func(*positional, **named)
        # On a copy: what the guard remembers for backward may not be overwritten.
        target = positional[0]
        positional[0] = target.clone()
        guard(positional, named)
        return target.copy_(getattr(torch, name)(*positional, **named))


def _guard_input(bounds: Callable[[torch.finfo], tuple[float, float]]) -> Callable[..., None]:
    """Return a guard that keeps the first argument within bounds that depend on its dtype."""

    def guard(positional: list[Any], named: dict[str, Any]) -> None:
        tensor = _real(positional[0])
        if tensor is not None:
            low, high = bounds(torch.finfo(tensor.dtype))
            positional[0] = _clamped(tensor, low, high)

    return guard


def _guard_divisor(position: int, name: str) -> Callable[..., None]:
    """Return a guard that keeps the divisor, an argument of this name or position, off zero."""

    def guard(positional: list[Any], named: dict[str, Any]) -> None:
        divisor = named.get(name) if name in named else positional[position]
        dividend = _real(positional[0])
        tensor = _real(divisor)
        if tensor is not None:
            divisor = _off_zero(tensor, torch.finfo(tensor.dtype).eps)
        elif divisor == 0 and dividend is not None and not isinstance(divisor, Tensor):
            divisor = math.copysign(torch.finfo(dividend.dtype).eps, divisor)
        if name in named:
            named[name] = divisor
        else:
            positional[position] = divisor

    return guard


def _guard_power(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard base ** exponent, whichever of them is a tensor."""
    base = positional[0]
    exponent = named.get("exponent", positional[-1])
    if isinstance(base, Tensor):
        tensor = _real(base)
        if tensor is not None:
            positional[0] = _guarded_base(tensor, exponent)
    elif (tensor := _real(exponent)) is not None:
        guarded = _guarded_exponent(float(base), tensor)
        if "exponent" in named:
            named["exponent"] = guarded
        else:
            positional[-1] = guarded


def _guard_reflected_power(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard number ** tensor, which Python hands over as tensor.__rpow__(number)."""
    tensor = _real(positional[0])
    if tensor is not None and isinstance(positional[1], int | float):
        positional[0] = _guarded_exponent(float(positional[1]), tensor)


def _guarded_base(base: Tensor, exponent: object) -> Tensor:
    """Return the base, moved where its power or the power's derivative isn't finite."""
    dtype = torch.finfo(base.dtype)
    if isinstance(exponent, Tensor) and not exponent.is_complex():
        positive = _clamped(base, dtype.eps, math.inf)
        if exponent.requires_grad:
            # The derivative by the exponent has the base's logarithm.
            return positive
        is_whole = exponent == exponent.floor()
        safe = torch.where(is_whole, _off_zero(base, dtype.eps), positive)
        return torch.where((exponent < 0) | ~is_whole, safe, base)
    if not isinstance(exponent, int | float) or (exponent >= 0 and exponent == int(exponent)):
        return base
    if exponent > 1:
        return _clamped(base, 0.0, math.inf)
    largest = dtype.max**_SHARE / max(1.0, abs(exponent))
    nearest = max(dtype.eps, largest ** (1 / (exponent - 1)))
    keeps_sign = exponent == int(exponent)
    return _off_zero(base, nearest) if keeps_sign else _clamped(base, nearest, math.inf)


def _guarded_exponent(base: float, exponent: Tensor) -> Tensor:
    """Return the exponent, ended where the power of this base gets too large."""
    if base <= 0 or base == 1 or not math.isfinite(base):
        return _clamped(exponent, 0.0, math.inf) if base == 0 else exponent
    limit = _largest_logarithm(torch.finfo(exponent.dtype)) / abs(math.log(base))
    return (
        _clamped(exponent, -math.inf, limit) if base > 1 else _clamped(exponent, -limit, math.inf)
    )


def _guard_reduction(
    func: Callable[..., Any], name: str, positional: list[Any], named: dict[str, Any]
) -> object:
    """Return a mean, deviation or variance, 0 where there are too few numbers for one."""
    tensor = positional[0]
    dim = named.get("dim", positional[1] if len(positional) > 1 else None)
    if not isinstance(tensor, Tensor) or isinstance(dim, str):
        return func(*positional, **named)
    if dim is None or isinstance(dim, bool):
        dim = tuple(range(tensor.dim()))
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(tensor.dim()))
    count = math.prod(tensor.shape[each] for each in dims)
    if count > (0 if name == "mean" else 1):
        return func(*positional, **named)
    place = 2 if name == "mean" else 3
    keepdim = named.get("keepdim", positional[place] if len(positional) > place else False)
    zero = 0 * tensor.sum(dims, keepdim=keepdim)
    return zero.to(named["dtype"]) if named.get("dtype") is not None else zero


def _real(value: object) -> Tensor | None:
    """Return a tensor of real numbers as a floating one, None if it isn't such a tensor."""
    if not isinstance(value, Tensor) or value.is_complex():
        return None
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _clamped(tensor: Tensor, low: float, high: float) -> Tensor:
    """Return the tensor with derivative 1 within [low, high], ended with derivative 0 outside."""
    return (
        tensor.clamp(min=None if low == -math.inf else low, max=None if high == math.inf else high)
        if (low, high) != (-math.inf, math.inf)
        else tensor
    )


def _off_zero(tensor: Tensor, nearest: float) -> Tensor:
    """Return the tensor with what is nearer to zero than `nearest` moved there, its sign kept."""
    edge = torch.full_like(tensor, nearest).copysign(tensor.detach())
    return torch.where(tensor.abs() < nearest, edge, tensor)


def _largest_logarithm(dtype: torch.finfo) -> float:
    """Return the logarithm of the largest result that an exponential may have."""
    return _SHARE * math.log(dtype.max)


_positive = _guard_input(lambda dtype: (dtype.eps, math.inf))
_exponential = _guard_input(lambda dtype: (-math.inf, _largest_logarithm(dtype)))
_within_one = _guard_input(lambda dtype: (dtype.eps - 1, 1 - dtype.eps))
_division = _guard_divisor(1, "other")

_REDUCTIONS = ("mean", "std", "var")

GUARDS: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "log": _positive,
    "log2": _positive,
    "log10": _positive,
    "sqrt": _positive,
    "rsqrt": _positive,
    "log1p": _guard_input(lambda dtype: (dtype.eps - 1, math.inf)),
    "acosh": _guard_input(lambda dtype: (1 + dtype.eps, math.inf)),
    "arccosh": _guard_input(lambda dtype: (1 + dtype.eps, math.inf)),
    "logit": _guard_input(lambda dtype: (dtype.eps, 1 - dtype.eps)),
    "exp": _exponential,
    "expm1": _exponential,
    "exp2": _guard_input(lambda dtype: (-math.inf, _largest_logarithm(dtype) / math.log(2))),
    "asin": _within_one,
    "acos": _within_one,
    "atanh": _within_one,
    "arcsin": _within_one,
    "arccos": _within_one,
    "arctanh": _within_one,
    "div": _division,
    "divide": _division,
    "true_divide": _division,
    "__truediv__": _division,
    "__itruediv__": _division,
    "__idiv__": _division,
    "__rdiv__": _guard_divisor(0, "self"),
    "__rtruediv__": _guard_divisor(0, "self"),
    "reciprocal": _guard_divisor(0, "self"),
    "addcdiv": _guard_divisor(2, "tensor2"),
    "pow": _guard_power,
    "__pow__": _guard_power,
    "__ipow__": _guard_power,
    "__rpow__": _guard_reflected_power,
}
"""What happens to the arguments (positional, named; changed in place) of functions by name."""


@dataclass(frozen=True)
class _Form:
    """A tensor is `kind` of `source`; `picks` are what was done to it since, one after another."""

    kind: str
    source: Tensor
    dim: int | None = None
    keeps_dim: bool = False
    picks: tuple[Callable[[Tensor], Tensor], ...] = field(default=())


class _Forms:
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

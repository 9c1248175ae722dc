"""A loss's operations kept away from inputs for which they aren't finite.

Under `guarding()` an operation's inputs are moved to the nearest number where its value and its
derivative are finite; inputs well away from there stay as they are, so that the result has the
same bits. A moved number has derivative zero: it is off the map, and no gradient can say how to get
back. What has a stable form is computed in it (fedrounds.doctor.logarithms).

Operations that no guard is made for are looked at by their results: what isn't finite though
everything that went in was, and what isn't a number of numbers, is replaced and has no gradient;
and a gradient that an operation makes non-finite is zero. So one term of a loss that is off the map
takes nothing from the others. Non-finite numbers that were there before stay, unless a zero
multiplies them: the guard mends what makes such numbers, not what passes them on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrounds.doctor.logarithms import Logarithms
from fedrounds.doctor.tensors import floating

_SHARE = 7 / 8


@contextmanager
def guarding(model: nn.Module | None = None) -> Iterator[None]:
    """While active, operations of torch called from Python are guarded as GUARDS says.

    Results and gradients are looked at only outside of the model's own modules.

    eps is the distance from 1 to the next number of the dtype; the edges are

    - log, log2, log10, sqrt, rsqrt, logit, and powers with fractional exponents: inputs below eps
      become eps (powers above 1: below 0 become 0); log1p: below -1 + eps; acosh: below 1 + eps;
    - quotients and reciprocals: divisors nearer to zero than eps become eps with their sign, plain
      numbers only where they are zero; negative powers likewise, and nearer to zero than what
      keeps the derivative below the dtype's largest number to the power 7/8;
    - exp, exp2, expm1, and powers of a number: results end at the dtype's largest number to the
      power 7/8, so that sums of some of them are finite, too;
    - cosh, sinh: arguments likewise;
    - asin, acos, atanh, erfinv: within 1 - eps of zero;
    - lgamma, digamma: off the poles at 0, -1, -2 and so on by eps;
    - cross_entropy, nll_loss and the binary losses: weights that aren't finite become the largest
      finite weight; with label smoothing a class whose logit is -inf gets a finite logit;
    - mean of nothing, std and var of nothing or of one number: 0.

    Norms need no guard: torch gives them derivative 0 at 0. What torch computes inside of
    its own functions (cross_entropy, batch_norm) isn't touched.
    """
    guard = _Guarding()
    with ExitStack() as stack:
        for module in () if model is None else model.modules():
            for handle in (
                module.register_forward_pre_hook(guard.enter, prepend=True),
                module.register_forward_hook(guard.leave, always_call=True),
            ):
                stack.callback(handle.remove)
        stack.enter_context(guard)
        yield


class _Guarding(TorchFunctionMode):
    """Changes what goes into the operations in GUARDS, and takes stable forms where there are."""

    def __init__(self) -> None:
        super().__init__()
        self._logarithms = Logarithms()
        self._depth = 0
        self._nodes: set[Any] = set()

    def enter(self, *_: object) -> None:
        """Note that a module of the model is at work."""
        self._depth += 1

    def leave(self, _module: nn.Module, _given: object, result: object) -> None:
        """Note that a module of the model is done, and that what it made isn't the loss's."""
        self._watch(list(result.values()) if isinstance(result, Mapping) else result)
        self._depth -= 1

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
        # The name of an operation that works in place ends with an underscore.
        plain = name.removesuffix("_") if not name.startswith("__") else name
        if plain != name:
            return self._in_place(func, plain, positional, named)
        stable = self._logarithms.rewritten(name, positional)
        if stable is not None:
            self._watch(stable)
            return stable
        given = tuple(positional)
        if name in _REDUCTIONS:
            result = _guard_reduction(func, name, positional, named)
        else:
            guard = GUARDS.get(name)
            if guard is not None:
                guard(positional, named)
            result = func(*positional, **named)
        if self._depth == 0 and isinstance(result, Tensor) and name not in _UNINITIALISED:
            result = _settled(result, name, given, named)
        self._watch(result)
        self._logarithms.note(func, name, given, named, result)
        return result

    def _watch(self, result: object) -> None:
        """Let what a result adds to the graph of the loss pass on no gradient that isn't finite."""
        nodes: list[Any] = [tensor.grad_fn for tensor, _ in floating(result)]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._nodes:
                continue
            # Held here: another node can't be taken for it.
            self._nodes.add(node)
            if self._depth == 0 and not hasattr(node, "variable"):
                node.register_hook(_finite_gradients)
            nodes.extend(following for following, _ in node.next_functions)

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
    """Return a mean, deviation or variance, 0 where there are too few numbers for it."""
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
    position = 2 if name == "mean" else 3
    keepdim = named.get("keepdim", positional[position] if len(positional) > position else False)
    zero = 0 * tensor.sum(dims, keepdim=keepdim)
    return zero.to(named["dtype"]) if named.get("dtype") is not None else zero


def _settled(
    result: Tensor, name: str, positional: Sequence[Any], named: Mapping[str, Any]
) -> Tensor:
    """Return a result without what isn't finite of no fault of its inputs.

    NaN made of numbers becomes 0, and so does what a zero multiplies; infinities made of finite
    numbers become as large as the largest finite entry. Where no entry is finite it stays as it is.
    """
    if not result.is_floating_point() or result.numel() == 0 or bool(result.isfinite().all()):
        return result
    values = [*positional, *named.values()]
    tensors = [tensor for value in values for tensor, _ in floating(value)]
    numbers = [value for value in values if isinstance(value, float)]
    if not any(isinstance(value, Tensor) for value in values) and not tensors:
        return result
    has_nan = any(map(math.isnan, numbers)) or any(bool(tensor.isnan().any()) for tensor in tensors)
    is_finite = all(map(math.isfinite, numbers)) and all(
        bool(tensor.isfinite().all()) for tensor in tensors
    )
    is_replaced = torch.zeros_like(result, dtype=torch.bool) if has_nan else result.isnan()
    if is_finite:
        is_replaced = is_replaced | result.isinf()
    if not bool(result.isfinite().any()):
        is_replaced = torch.zeros_like(is_replaced)
    if name in _PRODUCTS and len(positional) > 1:
        for factor in positional[:2]:
            is_replaced = is_replaced | (~result.isfinite() & (torch.as_tensor(factor) == 0))
    if not bool(is_replaced.any()):
        return result
    largest = result.detach()[result.isfinite()].abs()
    limit = float(largest.max()) if largest.numel() else 0.0
    replacement = result.detach().nan_to_num(nan=0.0, posinf=limit, neginf=-limit)
    return torch.where(is_replaced, replacement, result)


def _finite_gradients(gradients: Sequence[Tensor | None], _: object) -> tuple[Tensor | None, ...]:
    """Return gradients with zero for what isn't finite."""
    return tuple(
        grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if grad is not None and grad.is_floating_point()
        else grad
        for grad in gradients
    )


def _guard_poles(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard the gamma function's relatives, which have poles at 0, -1, -2 and so on."""
    tensor = _real(positional[0])
    if tensor is None:
        return
    eps = torch.finfo(tensor.dtype).eps
    pole = tensor.detach().round()
    is_near = (pole <= 0) & ((tensor - pole).abs() < eps)
    positional[0] = torch.where(is_near, pole + 2 * eps * pole.abs().clamp(min=1.0), tensor)


def _guard_weights(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard a loss's weights of classes or samples: 1 / 0 is no weight."""
    for position in range(2, len(positional)):
        positional[position] = _finite_weights(positional[position])
    for name in ("weight", "pos_weight"):
        if name in named:
            named[name] = _finite_weights(named[name])


def _finite_weights(weights: object) -> object:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        return weights
    finite = weights.detach()[weights.isfinite()]
    largest = float(finite.max()) if finite.numel() else 1.0
    return torch.where(weights.isfinite(), weights, largest)


def _guard_cross_entropy(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard its weights, and with label smoothing the classes that are masked with -inf."""
    _guard_weights(positional, named)
    smoothing = named.get("label_smoothing", positional[7] if len(positional) > 7 else 0.0)
    logits = positional[0]
    if not (smoothing and isinstance(logits, Tensor) and bool(logits.isneginf().any())):
        return
    finite = logits.detach()[logits.isfinite()]
    lowest = float(finite.min()) if finite.numel() else 0.0
    positional[0] = torch.where(logits.isneginf(), lowest - _MASKED, logits)


def _guard_ctc(positional: list[Any], named: dict[str, Any]) -> None:
    """Leave out the sequences that have no alignment."""
    if len(positional) > _ZERO_INFINITY:
        positional[_ZERO_INFINITY] = True
    else:
        named["zero_infinity"] = True


def _guard_poisson(positional: list[Any], named: dict[str, Any]) -> None:
    """Guard the exponential of a Poisson loss, where the loss takes an exponential."""
    if named.get("log_input", positional[2] if len(positional) > 2 else True):
        _exponential(positional, named)


def _guard_second(guard: Callable[..., None]) -> Callable[..., None]:
    """Return a guard of the second argument."""

    def guard_second(positional: list[Any], named: dict[str, Any]) -> None:
        if len(positional) > 1:
            rest = positional[1:]
            guard(rest, named)
            positional[1:] = rest

    return guard_second


def _real(value: object) -> Tensor | None:
    """Return a tensor of real numbers as floating-point numbers, None for anything else."""
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

_hyperbolic = _guard_input(lambda dtype: (-_largest_logarithm(dtype), _largest_logarithm(dtype)))

_REDUCTIONS = ("mean", "std", "var")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")
_UNINITIALISED = ("empty_like", "new_empty", "new_empty_strided")
_ZERO_INFINITY = 6
"""Where `zero_infinity` stands among the arguments of ctc_loss."""
_MASKED = 20.0
"""So far below the lowest logit stands that of a class masked with -inf."""

GUARDS: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "log": _positive,
    "log2": _positive,
    "log10": _positive,
    "sqrt": _positive,
    "rsqrt": _positive,
    "log1p": _guard_input(lambda dtype: (dtype.eps - 1, math.inf)),
    "cosh": _hyperbolic,
    "sinh": _hyperbolic,
    "lgamma": _guard_poles,
    "gammaln": _guard_poles,
    "digamma": _guard_poles,
    "psi": _guard_poles,
    "erfinv": _within_one,
    "xlogy": _guard_second(_positive),
    "cross_entropy": _guard_cross_entropy,
    "nll_loss": _guard_weights,
    "binary_cross_entropy": _guard_weights,
    "binary_cross_entropy_with_logits": _guard_weights,
    "poisson_nll_loss": _guard_poisson,
    "ctc_loss": _guard_ctc,
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
"""By function name: how its arguments (positional, named) are changed, in place."""

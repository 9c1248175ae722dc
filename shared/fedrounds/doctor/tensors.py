"""Properties of a tensor's numbers, and the memory that they are in."""

import cmath
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedrounds.diagnosis.values import Origin

Storage = tuple[torch.device, int]
"""Where a tensor's memory begins."""


def floating(value: object) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
    """Yield the floating tensors of an argument or a result, each with its position in a list."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value, None
        return
    if isinstance(value, list | tuple):
        is_results = isinstance(value, tuple)
        for number, each in enumerate(value):
            if isinstance(each, list):
                yield from floating(each)
            elif isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()):
                yield each, None if is_results else (number, len(value))


def values_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that may be sparse."""
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor


def storage_of(tensor: Tensor) -> Storage | None:
    """Return which memory a tensor is in, None if it has none."""
    values = values_of(tensor)
    if values.layout is not torch.strided or values.is_meta or values.numel() == 0:
        return None
    return values.device, values.untyped_storage().data_ptr()


def covers_its_storage(tensor: Tensor) -> bool:
    """Whether nothing else can be in the tensor's memory."""
    values = values_of(tensor)
    return values.numel() * values.element_size() == values.untyped_storage().nbytes()


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity."""
    values = values_of(tensor)
    # The sum shows it ten times faster, unless it overflows.
    total = values.sum().item()
    is_sure = cmath.isfinite(total) if values.is_complex() else math.isfinite(total)
    return is_sure or bool(values.isfinite().all())


@torch.no_grad()
def largest_of(tensor: Tensor) -> float:
    """Return the largest absolute finite value, 0 without any."""
    values = values_of(tensor)
    if values.is_complex():
        values = values.abs()
    if values.numel() and is_finite(values):
        low, high = values.aminmax()
        return max(abs(float(low)), abs(float(high)))
    finite = values[values.isfinite()]
    return float(finite.abs().amax()) if finite.numel() else 0.0


@torch.no_grad()
def describe(tensor: Tensor, origin: Origin) -> Origin:
    """Return the origin with the tensor's dtype, shape, counts and first bad position."""
    values = values_of(tensor)
    is_bad = ~values.isfinite()
    return replace(
        origin,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        num_nan=int(values.isnan().sum()),
        num_inf=int(values.isinf().sum()),
        first_index=tuple(is_bad.nonzero()[:1].flatten().tolist()),
    )

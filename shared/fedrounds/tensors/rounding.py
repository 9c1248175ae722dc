"""Conversion of float64 values to another dtype with a single rounding.

torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice: it rounds
1 + 2^-8 + 2^-30 first to the middle between two bfloat16 numbers, and then down to 1.
"""

import torch
from torch import Tensor


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values in `dtype`, each rounded once to the nearest number, ties to even.

    For integer dtypes, values beyond the range become its ends. The result owns its memory.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return _to_odd(values).to(dtype)
    if dtype.is_floating_point or dtype is torch.bool:
        return values.to(dtype, copy=True)
    return _whole(values, dtype)


def _to_odd(values: Tensor) -> Tensor:
    """Return float64 values in float32, rounded to odd.

    A value that float32 can't hold becomes the neighbour whose last bit is 1. A second rounding, to
    a type with at least two bits less, then still knows on which side of a midpoint the value was
    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd").
    """
    narrow = values.float()
    back = narrow.double()
    bits = narrow.view(torch.int32)
    # Sign and magnitude: subtracting 1 from the bits gives the next number towards 0.
    bits -= (back.abs() > values.abs()).int()
    bits |= (back != values).int()
    return narrow


def _whole(values: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    # float64 holds neither end of int64 exactly: the comparison decides, not the conversion.
    nearest = values.round()
    inside = nearest.clamp(float(limits.min), float(limits.max))
    converted = inside.to(dtype)
    return torch.where(nearest >= float(limits.max), limits.max, converted)

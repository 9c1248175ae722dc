"""float64 in another dtype, rounded once."""

import math
from fractions import Fraction

import pytest
import torch

from fedrounds.tensors.compression import restored
from fedrounds.tensors.rounding import rounded

PRECISIONS = {torch.float16: (11, -14, 65504.0), torch.bfloat16: (8, -126, 3.3895313892515355e38)}
"""Bits of the significand, the smallest normal exponent, the largest number."""


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """Return the number of `dtype` nearest to an exact value, ties to even, by whole numbers."""
    if value == 0:
        return 0.0
    bits, smallest, largest = PRECISIONS[dtype]
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (
        abs(value) < Fraction(2) ** exponent
    )
    unit = Fraction(2) ** (max(exponent, smallest) - bits + 1)
    # Python rounds a fraction to the nearest whole number, ties to even.
    multiple = round(value / unit) * unit
    if abs(multiple) > Fraction(largest):
        return math.copysign(math.inf, value)
    return float(multiple)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_each_value_is_the_nearest_value_of_the_dtype(dtype: torch.dtype) -> None:
    """Random values of all sizes, and the values next to the middle between two numbers."""
    bits, smallest, largest = PRECISIONS[dtype]
    generator = torch.Generator().manual_seed(1)
    values = (
        torch.randn(4000, generator=generator, dtype=torch.float64)
        * 2.0 ** torch.randint(smallest - bits - 3, 18, (4000,), generator=generator).double()
    ).tolist()
    middles = [(1 + k * 2.0 ** (1 - bits)) + 2.0**-bits for k in range(6)]
    for middle in [*middles, 2.0 ** (smallest - bits), 3 * 2.0 ** (smallest - bits), largest]:
        for nudge in (0.0, 2.0**-30, -(2.0**-30), 2.0**-50, -(2.0**-50)):
            values += [middle * (1 + nudge), -middle * (1 + nudge)]
    values += [largest * (1 + 2.0 ** -(bits + 1)), largest * 4, 5e-324, 1e300, 0.0]
    result = rounded(torch.tensor(values, dtype=torch.float64), dtype)
    assert result.dtype is dtype
    for value, got in zip(values, result.tolist(), strict=True):
        assert got == nearest(Fraction(value), dtype), value


def test_a_bit_that_float32_drops_decides() -> None:
    """1 + 2^-8 + 2^-30 lies above the middle between 1 and the next bfloat16."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-30], dtype=torch.float64)
    assert rounded(value, torch.bfloat16).item() == 1 + 2.0**-7
    assert value.to(torch.bfloat16).item() == 1.0
    base = torch.ones(1, dtype=torch.bfloat16)
    assert restored(base, torch.tensor([2.0**-8 + 2.0**-30])).item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_no_number_stays(dtype: torch.dtype) -> None:
    """Infinities, a NaN, and the sign of zero."""
    values = torch.tensor([math.inf, -math.inf, math.nan, -0.0], dtype=torch.float64)
    plus, minus, nan, zero = rounded(values, dtype).tolist()
    assert (plus, minus) == (math.inf, -math.inf)
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


def test_whole_numbers_are_rounded_to_even_and_end_at_the_range() -> None:
    """Of each integer dtype."""
    values = torch.tensor([0.5, 1.5, -2.5, 1e30, -1e30], dtype=torch.float64)
    for dtype in (torch.int8, torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        assert rounded(values, dtype).tolist() == [0, 2, -2, limits.max, limits.min]
    assert rounded(values, torch.uint8).tolist() == [0, 2, 0, 255, 0]

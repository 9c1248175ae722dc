"""The median and the robust standard deviation that outliers are measured by."""

import pytest
import torch

from fedrounds.outliers import median_and_deviation


def test_it_is_the_standard_deviation_of_normal_values() -> None:
    """Of 100,001 draws with mean 10 and deviation 2, and one absurd value that changes nothing."""
    values = 10 + 2 * torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    values[0] = 1e30
    median, deviation = median_and_deviation(values.double())
    assert median.item() == pytest.approx(10, abs=0.05)
    assert deviation.item() == pytest.approx(2, rel=0.02)


def test_it_is_a_tenth_of_the_median_at_least_and_never_zero() -> None:
    """Values that are all the same have a deviation all the same."""
    same = torch.full((5,), 3.0, dtype=torch.float64)
    assert median_and_deviation(same)[1].item() == pytest.approx(0.3)
    assert median_and_deviation(torch.zeros(5, dtype=torch.float64))[1].item() > 0

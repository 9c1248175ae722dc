"""What makes an input an outlier: the rule of the doctor, and of the client's preflight checks."""

import torch
from torch import Tensor

OUTLIER_DEVIATIONS = 20.0
"""An outlier lies at least so many robust standard deviations above the median."""

OUTLIER_FACTOR = 10.0
"""And is at least so many times what is usual: for either caller something else."""

# The median absolute deviation of normal values is their standard deviation over this: Rousseeuw
# and Croux 1993, "Alternatives to the Median Absolute Deviation".
_NORMAL_PER_MAD = 1.4826


def median_and_deviation(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the robust standard deviation of magnitudes, float [n], as scalars.

    The deviation is 1.4826 times the median absolute deviation, and at least a tenth of the median:
    magnitudes that are nearly all the same make no outlier of a slightly larger magnitude.
    """
    median = magnitudes.median()
    deviation = _NORMAL_PER_MAD * (magnitudes - median).abs().median()
    least = torch.finfo(torch.float32).tiny
    return median, torch.maximum(deviation, median / 10).clamp(min=least)

"""What compares an update with its cohort, over all that was recorded when a round closed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_COHORT = 4
"""With fewer updates nobody can say which of them is the odd one."""

_TO_DEVIATION = 1.4826
_LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class NormBand:
    """The norms of deltas that belong together: `low` to `high` around the median."""

    median: float
    mad: float
    low: float
    high: float


def norm_band(norms: Sequence[float], *, width: float) -> NormBand | None:
    """Return the band of a cohort's delta norms.

    None for fewer than MIN_COHORT of them, and where the median is 0: most changed nothing, which
    gives no measure for the others.

    `width` robust standard deviations (1.4826 times the median absolute deviation, as for normal
    values: Rousseeuw and Croux 1993) to either side of the median. The deviation counts as a tenth
    of the median at least, or a cohort that agrees by chance would turn out everybody else.
    """
    if len(norms) < MIN_COHORT:
        return None
    median = statistics.median(norms)
    if not median:
        return None
    mad = statistics.median(abs(norm - median) for norm in norms)
    reach = width * max(_TO_DEVIATION * mad, _LEAST_SPREAD * median)
    return NormBand(median=median, mad=mad, low=max(0.0, median - reach), high=median + reach)

"""Which clients make up a round's cohort."""

import random
from collections.abc import Collection


def choose_cohort(candidates: Collection[int], *, size: int, seed: int) -> tuple[int, ...]:
    """Return `size` of the client ids (0, or more than there are: all), ascending.

    Uniform without replacement; a function of the set of candidates and the seed alone.
    """
    ordered = sorted(candidates)
    if size == 0 or size >= len(ordered):
        return tuple(ordered)
    return tuple(sorted(random.Random(seed).sample(ordered, size)))

"""Which clients make up a round's cohort: a function of their past and a seed alone."""

import heapq
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fedrounds.seeds import derive_seed
from fedserver.records import Participation
from fedserver.settings import CohortName

_NO_PAST = Participation()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A client that may be asked; `num_examples` is the size of its data."""

    client_id: int
    num_examples: int = 1
    past: Participation = _NO_PAST


def cohort_seed(seed: int, *, round_number: int, attempt: int) -> int:
    """Return the seed of a cohort's draw, for the run's seed and an attempt at a round."""
    return derive_seed(seed, "cohort", round_number=round_number, attempt=attempt)


Choice = Callable[[Sequence[Candidate], int, int, random.Random], Collection[Candidate]]
"""(candidates by id, size of the cohort, number to draw first, generator) -> the cohort."""


def choose_cohort(
    candidates: Collection[Candidate],
    *,
    size: int,
    seed: int,
    cohort: CohortName = "uniform",
    num_drawn: int = 0,
) -> tuple[int, ...]:
    """Return `size` of the client ids (0, or more than there are: all), ascending.

    A function of the set of candidates, the choice named `cohort` and the seed alone. `num_drawn`
    is how many power-of-choice looks at (0: twice the size).
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.client_id)
    if size == 0 or size >= len(ordered):
        return tuple(candidate.client_id for candidate in ordered)
    drawn = min(len(ordered), max(size, num_drawn or 2 * size))
    chosen = _CHOICES[cohort](ordered, size, drawn, random.Random(seed))
    return tuple(sorted(candidate.client_id for candidate in chosen))


def _uniform(
    candidates: Sequence[Candidate], size: int, _: int, generator: random.Random
) -> Collection[Candidate]:
    return generator.sample(candidates, size)


def _by_data_size(
    candidates: Sequence[Candidate], size: int, _: int, generator: random.Random
) -> Collection[Candidate]:
    """Choose one by one, each with a probability in proportion to its number of examples."""
    return _weighted(
        candidates, [candidate.num_examples for candidate in candidates], size, generator
    )


def _round_robin(
    candidates: Sequence[Candidate], size: int, _: int, generator: random.Random
) -> Collection[Candidate]:
    """Choose the candidates that were asked least often so far; among equals at random."""
    shuffled = generator.sample(candidates, len(candidates))
    return heapq.nsmallest(size, shuffled, key=lambda candidate: candidate.past.num_asked)


def _power_of_choice(
    candidates: Sequence[Candidate], size: int, num_drawn: int, generator: random.Random
) -> Collection[Candidate]:
    """Draw some by the size of their data, and of these choose those with the largest losses.

    Cho et al. 2020, "Client Selection in Federated Learning: Convergence Analysis and
    Power-of-Choice Selection Strategies", in the variant rpow-d: the losses are those that clients
    reported last. A client that has reported none, or a loss that isn't finite, comes first: its
    loss isn't known yet, or beyond all numbers.
    """
    drawn = _by_data_size(candidates, num_drawn, num_drawn, generator)

    def loss(candidate: Candidate) -> float:
        reported = candidate.past.loss
        return reported if reported is not None and math.isfinite(reported) else math.inf

    return heapq.nlargest(size, drawn, key=loss)


def _by_availability(
    candidates: Sequence[Candidate], size: int, _: int, generator: random.Random
) -> Collection[Candidate]:
    """Choose by how likely an answer is: answered orders and 1 of all orders and 2 (Laplace)."""
    shares = [
        (candidate.past.num_answered + 1) / (candidate.past.num_asked + 2)
        for candidate in candidates
    ]
    return _weighted(candidates, shares, size, generator)


def _weighted(
    candidates: Sequence[Candidate], weights: Sequence[float], size: int, generator: random.Random
) -> list[Candidate]:
    """Draw without replacement, each time proportional to the weights of those that are left.

    Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", algorithm A: the
    largest u^(1/w), here of its logarithm.
    """
    # 1 - random() lies above 0 and up to 1.
    keys = [math.log(1 - generator.random()) / weight for weight in weights]
    best = heapq.nlargest(size, range(len(keys)), key=keys.__getitem__)
    return [candidates[index] for index in best]


_CHOICES: Mapping[CohortName, Choice] = {
    "uniform": _uniform,
    "data-size": _by_data_size,
    "round-robin": _round_robin,
    "power-of-choice": _power_of_choice,
    "availability": _by_availability,
}

RESTS_ON_THE_PAST: frozenset[CohortName] = frozenset(
    {"round-robin", "power-of-choice", "availability"}
)
"""The choices that look at what clients have done before."""

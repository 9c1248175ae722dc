"""Cohorts: a function of the set of candidates and the seed, and fair in each choice's own way."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver.clients.sampling import Candidate, choose_cohort
from fedserver.records import Participation
from fedserver.settings import CohortName

COHORTS: Sequence[CohortName] = get_args(CohortName)

pasts = st.builds(
    Participation,
    num_asked=st.integers(0, 9),
    num_answered=st.integers(0, 9),
    loss=st.none() | st.floats(allow_nan=True),
)
candidate = st.builds(
    Candidate,
    client_id=st.integers(0, 2**53),
    num_examples=st.integers(1, 10**7),
    past=pasts,
)
anybody = st.lists(candidate, unique_by=lambda candidate: candidate.client_id, max_size=30)


def those(client_ids: Collection[int]) -> list[Candidate]:
    """Return candidates of whom nothing is known."""
    return [Candidate(client_id=client_id) for client_id in client_ids]


@pytest.mark.parametrize("cohort", COHORTS)
@given(candidates=anybody, size=st.integers(0, 35), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_a_cohort_is_a_function_of_the_set_and_the_seed(
    cohort: CohortName, candidates: list[Candidate], size: int, seed: int, data: st.DataObject
) -> None:
    """Ascending, of candidates only, as many as asked for (0: all), whatever order they come in."""
    chosen = choose_cohort(candidates, size=size, seed=seed, cohort=cohort)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= {candidate.client_id for candidate in candidates}
    assert len(chosen) == (min(size, len(candidates)) if size else len(candidates))
    shuffled = data.draw(st.permutations(candidates))
    assert choose_cohort(shuffled, size=size, seed=seed, cohort=cohort) == chosen


def test_a_cohort_is_pinned() -> None:
    """The draw of one seed stays what it is, so that a run can be repeated."""
    assert choose_cohort(those(range(10)), size=4, seed=42) == (0, 1, 4, 9)
    assert choose_cohort(those(range(10)), size=4, seed=42, cohort="data-size") == (1, 3, 7, 9)


def times_chosen(
    candidates: Sequence[Candidate],
    *,
    size: int,
    cohort: CohortName = "uniform",
    num_drawn: int = 0,
    num_rounds: int = 2000,
) -> Counter[int]:
    """Return how often each client is chosen."""
    return Counter(
        client
        for seed in range(num_rounds)
        for client in choose_cohort(
            candidates, size=size, seed=seed, cohort=cohort, num_drawn=num_drawn
        )
    )


def test_every_client_is_chosen_about_equally_often() -> None:
    """10 of 100 in 2,000 rounds: 200 times each; a binomial's five sigma is 67."""
    times = times_chosen(those(range(100)), size=10)
    assert len(times) == 100
    assert all(abs(count - 200) < 67 for count in times.values())


def test_by_data_size_a_client_is_chosen_in_proportion_to_its_examples() -> None:
    """One of 10, 20, 30 and 40 examples: shares of 0.1 to 0.4; five sigma of 2,000 is at most 110.

    Two of them without replacement: the first of two is left out with 0.9, and chosen second with
    0.2 / 0.8 * 0.1 ... : by hand 0.1 + 0.1 * (0.2 / 0.8 + 0.3 / 0.7 + 0.4 / 0.6) = 0.2345.
    """
    candidates = [
        Candidate(client_id=client_id, num_examples=10 * client_id) for client_id in (1, 2, 3, 4)
    ]
    times = times_chosen(candidates, size=1, cohort="data-size")
    assert all(abs(times[client] - 200 * client) < 110 for client in (1, 2, 3, 4))
    two = times_chosen(candidates, size=2, cohort="data-size")
    assert abs(two[1] / 2000 - 0.2345) < 0.05


def test_round_robin_asks_everybody_before_it_asks_anybody_again() -> None:
    """Of 10 clients 4 a round: after any number of rounds nobody is two ahead of another."""
    asked = dict.fromkeys(range(10), 0)
    for seed in range(25):
        candidates = [
            Candidate(client_id=client_id, past=Participation(num_asked=count))
            for client_id, count in asked.items()
        ]
        for client_id in choose_cohort(candidates, size=4, seed=seed, cohort="round-robin"):
            asked[client_id] += 1
        assert max(asked.values()) - min(asked.values()) <= 1
    first = times_chosen(those(range(10)), size=4, cohort="round-robin", num_rounds=200)
    # Among equals at random: 80 times each, five sigma is 35.
    assert all(abs(first[client_id] - 80) < 35 for client_id in range(10))


def with_losses(losses: Sequence[float | None]) -> list[Candidate]:
    """Return clients that have reported these losses."""
    return [
        Candidate(client_id=client_id, past=Participation(num_asked=1, num_answered=1, loss=loss))
        for client_id, loss in enumerate(losses)
    ]


def test_power_of_choice_takes_the_largest_losses_of_those_it_draws() -> None:
    """All drawn: the largest. As many drawn as asked: any. Unknown and invalid losses first."""
    losses = [0.1, 0.9, 0.5, 0.7, 0.3, 0.2]
    everybody = with_losses(losses)
    for num_drawn in (6, 100):
        chosen = choose_cohort(
            everybody, size=2, seed=1, cohort="power-of-choice", num_drawn=num_drawn
        )
        assert chosen == (1, 3)
    few = times_chosen(
        with_losses(losses), size=2, cohort="power-of-choice", num_drawn=2, num_rounds=600
    )
    assert all(abs(few[client_id] - 200) < 58 for client_id in range(6))
    # Of six, four are drawn: two of them have a larger loss than the two with the smallest.
    twice = times_chosen(with_losses(losses), size=2, cohort="power-of-choice", num_rounds=200)
    assert min(twice[1], twice[3]) > twice[2] > 0
    assert twice[0] == twice[5] == 0
    odd = with_losses([5.0, None, float("nan"), 9.0])
    assert choose_cohort(odd, size=2, seed=1, cohort="power-of-choice", num_drawn=4) == (1, 2)


def test_by_availability_those_who_answer_are_asked_more_often() -> None:
    """9 of 9 answered against 1 of 9 and nothing known: 10/11, 2/11 and 1/2 of their sum."""
    candidates = [
        Candidate(client_id=0, past=Participation(num_asked=9, num_answered=9)),
        Candidate(client_id=1, past=Participation(num_asked=9, num_answered=1)),
        Candidate(client_id=2),
    ]
    times = times_chosen(candidates, size=1, cohort="availability")
    total = 10 / 11 + 2 / 11 + 1 / 2
    for client, share in ((0, 10 / 11), (1, 2 / 11), (2, 1 / 2)):
        assert abs(times[client] / 2000 - share / total) < 0.06

"""Cohorts: a function of the set of candidates and the seed, and fair."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedserver.sampling import choose_cohort

ids = st.lists(st.integers(0, 2**53), unique=True, max_size=30)


@given(candidates=ids, size=st.integers(0, 35), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_a_cohort_is_a_function_of_the_set_and_the_seed(
    candidates: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    """Ascending, of candidates only, as many as asked for (0: all), whatever order they come in."""
    chosen = choose_cohort(candidates, size=size, seed=seed)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(candidates)
    assert len(chosen) == (min(size, len(candidates)) if size else len(candidates))
    shuffled = data.draw(st.permutations(candidates))
    assert choose_cohort(set(shuffled), size=size, seed=seed) == chosen
    assert choose_cohort(shuffled, size=size, seed=seed) == chosen


def test_a_cohort_is_pinned() -> None:
    """The draw of one seed stays what it is, so that a run can be repeated."""
    assert choose_cohort(range(10), size=4, seed=42) == (0, 1, 4, 9)


def test_every_client_is_chosen_about_equally_often() -> None:
    """10 of 100 in 2,000 rounds: 200 times each; a binomial's five sigma is 67."""
    times = Counter(
        client for seed in range(2000) for client in choose_cohort(range(100), size=10, seed=seed)
    )
    assert len(times) == 100
    assert all(abs(count - 200) < 67 for count in times.values())

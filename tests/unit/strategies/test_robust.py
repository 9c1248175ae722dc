"""Robust rules beside byzfl, SciPy and formulas written out, and what must always hold."""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byzfl import (
    NNM,
    ALittleIsEnough,
    Bucketing,
    CenteredClipping,
    Clipping,
    Gaussian,
    GeometricMedian,
    InnerProductManipulation,
    Krum,
    Median,
    Mimic,
    MultiKrum,
    SignFlipping,
    TrMean,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import trim_mean

from fedrounds.strategies import blocks
from fedrounds.strategies.components import UnfitCohort
from fedrounds.strategies.geometry import squared_distances
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.types import EntryKind
from tests.factories import State
from tests.vectors import Vectors, aggregate, attacked, cohort_of, composed

ALL = (
    *("uniform", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"),
    *("centered-clipping", "bulyan", "clip", "nnm+uniform", "bucketing+uniform", "nnm+median"),
    *("clip+nnm+krum", "bucketing+geometric-median"),
)


def clipped_to_median(vectors: Vectors) -> Vectors:
    """The default radius: the median of the norms."""
    return np.asarray(Clipping(c=float(np.median(np.linalg.norm(vectors, axis=1))))(vectors.copy()))


def one_clipping(vectors: Vectors) -> Vectors:
    """Byzfl's remembers its last centre, so each call gets a new object."""
    return np.asarray(CenteredClipping(L=4, tau=5.0)(vectors))


# byzfl's Krum counts n - f - 1 neighbours, the paper n - f - 2: its f is the paper's and 1.
REFERENCES: list[tuple[str, dict[str, float], Callable[[Vectors], Vectors]]] = [
    ("uniform", {}, lambda vectors: vectors.mean(axis=0)),
    ("median", {}, Median()),
    ("trimmed-mean", {"trim": 0.25}, TrMean(f=3)),
    ("trimmed-mean", {"trim": 0.25}, lambda vectors: trim_mean(vectors, 0.25, axis=0)),
    ("krum", {"f": 3}, Krum(f=4)),
    ("multi-krum", {"f": 3, "keep": 9}, MultiKrum(f=4)),
    ("geometric-median", {"nu": 0.1, "iterations": 3}, GeometricMedian(nu=0.1, T=3)),
    ("geometric-median", {"nu": 1e-6, "iterations": 60}, GeometricMedian(nu=1e-6, T=60)),
    ("centered-clipping", {"radius": 5, "iterations": 4}, one_clipping),
    ("clip", {"radius": 9}, composed(Clipping(c=9.0), lambda vectors: vectors.mean(axis=0))),
    ("clip+median", {}, composed(clipped_to_median, Median())),
    ("nnm+krum", {"f": 3}, composed(NNM(f=3), Krum(f=4))),
    ("nnm+median", {"f": 3}, composed(NNM(f=3), Median())),
    ("nnm+trimmed-mean", {"f": 3, "trim": 0.25}, composed(NNM(f=3), TrMean(f=3))),
    (
        "clip+nnm+geometric-median",
        {"f": 3, "radius": 15, "nu": 0.1, "iterations": 3},
        composed(Clipping(c=15.0), NNM(f=3), GeometricMedian(nu=0.1, T=3)),
    ),
]


@pytest.mark.parametrize(
    ("strategy", "parameters", "reference"),
    REFERENCES,
    ids=[f"{name} {parameters}" for name, parameters, _ in REFERENCES],
)
def test_a_rule_is_that_of_an_independent_library(
    tmp_path: Path,
    strategy: str,
    parameters: dict[str, float],
    reference: Callable[[Vectors], Vectors],
) -> None:
    """Equal to byzfl's or SciPy's within 1e-9, wherever the global model is."""
    updates = attacked()
    expected = np.asarray(reference(updates.copy()))
    aggregated = aggregate(tmp_path, strategy, updates, parameters)
    assert np.abs(aggregated - expected).max() < 1e-9
    base = 10 * attacked(num_updates=4)[0]
    moved = aggregate(tmp_path, strategy, updates + base, parameters, base=base)
    assert np.abs(moved - base - expected).max() < 1e-9


ATTACKS: Sequence[Callable[[Vectors], Vectors]] = (
    SignFlipping(),
    InnerProductManipulation(tau=2.0),
    ALittleIsEnough(tau=1.5),
    Mimic(epsilon=1),
    Gaussian(mu=0.0, sigma=100.0),
)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_under_byzfls_attacks_the_rules_still_agree(
    tmp_path: Path, attack: Callable[[Vectors], Vectors]
) -> None:
    """Attackers send the same bytes, so that distances are 0 and scores are tied."""
    updates = attacked(size=50, attack=attack)
    for strategy, parameters, reference in REFERENCES:
        expected = np.asarray(reference(updates.copy()))
        aggregated = aggregate(tmp_path, strategy, updates, parameters)
        assert np.abs(aggregated - expected).max() < 1e-9, strategy


def test_the_rows_of_the_examples_are_what_they_say(tmp_path: Path) -> None:
    """The middle half of 13 is 7 values, SciPy's trimmed mean; weights by a root of 1 to 13."""
    own = "examples.own_strategy"
    updates = attacked()
    aggregated = aggregate(tmp_path, f"{own}:midmean", updates)
    assert np.abs(aggregated - trim_mean(updates, 0.25, axis=0)).max() < 1e-12
    aggregated = aggregate(tmp_path, f"{own}:by_root", updates, {"power": 0.25})
    expected = np.average(updates, axis=0, weights=np.arange(1, 14) ** 0.25)
    assert np.abs(aggregated - expected).max() < 1e-12


def plain_bulyan(updates: Vectors, f: int) -> Vectors:
    """Return Bulyan as in El Mhamdi et al.: choose by Krum, then the middle of each coordinate."""
    remaining = list(range(len(updates)))
    chosen: list[int] = []
    while len(chosen) < len(updates) - 2 * f:
        scores = []
        for candidate in remaining:
            distances = sorted(
                float(((updates[candidate] - updates[other]) ** 2).sum())
                for other in remaining
                if other != candidate
            )
            scores.append(sum(distances[: max(1, len(remaining) - f - 2)]))
        chosen.append(remaining.pop(int(np.argmin(scores))))
    result = []
    for values in updates[chosen].T:
        nearest = sorted(values, key=lambda value: abs(value - np.median(values)))
        result.append(np.mean(nearest[: len(chosen) - 2 * f]))
    return np.array(result)


@pytest.mark.parametrize(("num_updates", "f"), [(7, 1), (12, 2), (13, 2), (5, 0)])
def test_bulyan_is_the_papers(tmp_path: Path, num_updates: int, f: int) -> None:
    """Beside the paper's two steps written out, with an even and an odd number chosen."""
    updates = attacked(num_updates=num_updates, num_bad=f, size=40) if f else attacked()[:5]
    aggregated = aggregate(tmp_path, "bulyan", updates, {"f": f})
    assert np.abs(aggregated - plain_bulyan(updates, f)).max() < 1e-12


def test_buckets_are_means_of_updates_dealt_at_random(tmp_path: Path) -> None:
    """Of 7 updates 3 buckets of 2 and one of 1; each counted once, by the seed alone."""
    updates = np.eye(7)
    medians = set()
    for seed in range(5):
        # The largest of each coordinate shows whose bucket it is in: 1/2, or 1 where it is alone.
        aggregated = aggregate(
            tmp_path, "bucketing+trimmed-mean", updates, {"trim": 0.25}, seed=seed
        )
        assert np.array_equal(
            aggregated,
            aggregate(tmp_path, "bucketing+trimmed-mean", updates, {"trim": 0.25}, seed=seed),
        )
        mean = aggregate(tmp_path, "bucketing+uniform", updates, seed=seed)
        assert sorted(np.round(mean * 8).tolist()) == [1, 1, 1, 1, 1, 1, 2]
        medians.add(int(mean.argmax()))
    assert len(medians) > 1, "every seed deals alike"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_buckets_are_byzfls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """With the order that the seed draws; of 13 updates the last bucket may have fewer."""
    updates = attacked()
    order = random.Random(5).sample(range(13), 13)
    monkeypatch.setattr(np.random, "permutation", lambda vectors: vectors[order])
    parameters = {"size": size, "nu": 0.1, "iterations": 3}
    expected = composed(Bucketing(s=size), GeometricMedian(nu=0.1, T=3))(updates)
    aggregated = aggregate(tmp_path, "bucketing+geometric-median", updates, parameters, seed=5)
    assert np.abs(aggregated - expected).max() < 1e-9


@pytest.mark.parametrize("strategy", ["median", "krum", "multi-krum", "geometric-median", "bulyan"])
def test_a_rule_bears_what_the_mean_does_not(tmp_path: Path, strategy: str) -> None:
    """Three of 15 updates far away: the mean follows them, a rule stays with the others."""
    updates = 1 + 0.1 * np.random.default_rng(3).standard_normal((15, 50))
    updates[[2, 7, 9]] = -1000.0
    parameters = {"f": 3.0} if strategy in ("krum", "multi-krum", "bulyan") else {}
    assert np.abs(aggregate(tmp_path, "uniform", updates) - 1).min() > 100
    assert np.abs(aggregate(tmp_path, strategy, updates, parameters) - 1).max() < 0.4


values = st.floats(-1e3, 1e3, width=32)
vectors = arrays(np.float64, st.tuples(st.integers(7, 9), st.integers(1, 4)), elements=values)
fewer = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("strategy", ALL)
@fewer
@given(updates=vectors, data=st.data())
def test_what_holds_for_every_rule(
    tmp_path: Path, strategy: str, updates: Vectors, data: st.DataObject
) -> None:
    """Within the cohort's bounds (or between them and the base), and moved along with everybody.

    Where no ties are broken by the client id and nothing is drawn, the order doesn't matter either.
    """
    aggregated = aggregate(tmp_path, strategy, updates)
    with_base = np.vstack([updates, np.zeros(updates.shape[1])])
    scale = np.abs(updates).max() + 1
    assert (aggregated <= with_base.max(axis=0) + 1e-9 * scale).all()
    assert (aggregated >= with_base.min(axis=0) - 1e-9 * scale).all()
    if strategy in ("median", "trimmed-mean"):
        order = data.draw(st.permutations(range(len(updates))))
        assert np.array_equal(aggregate(tmp_path, strategy, updates[order]), aggregated)
    if strategy in ("uniform", "median", "trimmed-mean", "geometric-median", "centered-clipping"):
        shift = np.arange(1.0, updates.shape[1] + 1)
        moved = aggregate(tmp_path, strategy, updates + shift, base=shift)
        assert np.abs(moved - shift - aggregated).max() <= 1e-6 * scale


def test_the_order_does_not_matter_where_nothing_is_tied(tmp_path: Path) -> None:
    """Values without ties: every rule that draws nothing gives the same for any order.

    But for Bulyan: the last of its choices is between two that are each other's only neighbour.
    """
    updates = attacked(num_updates=11)
    order = np.random.default_rng(5).permutation(11)
    for strategy in ALL:
        if strategy == "bulyan" or "bucketing" in strategy:
            continue
        aggregated = aggregate(tmp_path, strategy, updates)
        again = aggregate(tmp_path, strategy, updates[order])
        assert np.abs(aggregated - again).max() < 1e-12, strategy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_distances_are_those_of_the_oracle(tmp_path: Path, dtype: torch.dtype) -> None:
    """Within 1e-9 of long doubles, also of nearly equal updates, and 0 of equal updates."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(150_001, generator=generator)
    updates = [base + 0.01 * torch.randn(len(base), generator=generator) for _ in range(6)]
    updates += [updates[0] * (1 + 1e-5), updates[0].clone(), base + 1e4]
    states = [vector.to(dtype) for vector in (base, *updates)]
    cohort = cohort_of(tmp_path, {"w": states[0]}, [{"w": state} for state in states[1:]])
    distances = np.sqrt(squared_distances(cohort))
    exact = [state.double().numpy().astype(np.longdouble) for state in states]
    for row, vector in enumerate(exact):
        for column, other in enumerate(exact):
            expected = np.sqrt(((vector - other) ** 2).sum())
            assert abs(distances[row, column] - expected) <= 1e-9 * expected, (row, column)
    assert distances[1, 8] == 0


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_distances_of_small_entries_are_as_exact(
    tmp_path: Path, size: int, dtype: torch.dtype
) -> None:
    """Within 1e-9 of exact fractions, where one pair is a million times nearer than the others.

    In small entries nothing averages out what the slices leave out.
    """
    generator = torch.Generator().manual_seed(size)
    for trial in range(30):
        states = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4)]
        nearer = 2.0 ** -(trial % 22)
        states.append(states[-1] * (1 + nearer))
        # Of few bits, so that its own lower slice may be empty.
        states.append(states[0].bfloat16().double())
        states = [state.to(dtype) for state in states]
        cohort = cohort_of(tmp_path, {"w": states[0]}, [{"w": state} for state in states[1:]])
        distances = squared_distances(cohort)
        exact = [[Fraction(value) for value in state.tolist()] for state in states]
        for row, vector in enumerate(exact):
            for column, other in enumerate(exact):
                expected = sum((a - b) ** 2 for a, b in zip(vector, other, strict=True))
                assert abs(Fraction(distances[row, column]) - expected) <= expected / 10**9


def test_float32_would_choose_the_wrong_client(tmp_path: Path) -> None:
    """The usual formula in float32 names another client than the exact distances: ours doesn't.

    Deltas of one large common part and a small part of their own: norms of 1000, distances of 0.01
    and less, of which float32's 24 bits hold nothing.
    """
    generator = np.random.default_rng(2)
    common = generator.standard_normal(200_000)
    common *= 1000 / np.linalg.norm(common)
    own = generator.standard_normal((8, 200_000))
    own *= np.linspace(3e-3, 1e-2, 8)[::-1, None] / np.linalg.norm(own, axis=1, keepdims=True)
    updates = common + own
    narrow = updates.astype(np.float32)
    norms = (narrow**2).sum(axis=1)
    in_float32 = norms[:, None] + norms[None, :] - 2 * narrow @ narrow.T
    exact = ((updates[:, None] - updates[None]) ** 2).sum(axis=2)
    scores = [np.sort(distances)[1:6].sum() for distances in exact]
    assert np.argmin([np.sort(distances)[1:6].sum() for distances in in_float32]) != np.argmin(
        scores
    )
    aggregated = aggregate(tmp_path, "krum", updates, {"f": 1})
    assert np.array_equal(aggregated, updates[np.argmin(scores)])


def test_float_buffers_go_by_coordinate_and_the_rest_by_its_rule(tmp_path: Path) -> None:
    """Krum's parameters are one client's; running statistics the median, counters the maximum."""
    kinds = {
        "w": EntryKind.PARAMETER,
        "norm.running_var": EntryKind.MEAN,
        "norm.num_batches_tracked": EntryKind.MAX,
    }
    places = [0.0, 0.1, 0.2, 50.0, 51.0]

    def state(number: int) -> State:
        return {
            "w": torch.tensor([places[number]]),
            "norm.running_var": torch.tensor([10.0 * number]),
            "norm.num_batches_tracked": torch.tensor(number),
        }

    cohort = cohort_of(tmp_path, state(0), [state(number) for number in range(5)], kinds=kinds)
    strategy = find_strategy("krum", {"f": 1})
    values = {block.block.name: block.values.item() for block in next_blocks(strategy, cohort)}
    # With n - f - 2 = 2 neighbours the middle one of the three is nearest.
    assert values == {
        "w": pytest.approx(0.1),
        "norm.running_var": 20.0,
        "norm.num_batches_tracked": 4,
    }


@pytest.mark.parametrize("strategy", ["clip", "clip+trimmed-mean", "nnm+uniform"])
def test_a_buffer_cannot_do_what_a_step_prevents(tmp_path: Path, strategy: str) -> None:
    """One of seven sends a running variance that would end the model: the median bears it."""
    kinds = {"w": EntryKind.PARAMETER, "norm.running_var": EntryKind.MEAN}
    states: list[State] = [
        {"w": torch.ones(1), "norm.running_var": torch.tensor([variance])}
        for variance in (1.0, 1.25, 1e12, 1.5, 0.75, 0.5, 2.0)
    ]
    cohort = cohort_of(tmp_path, states[0], states, kinds=kinds)
    blocks = next_blocks(find_strategy(strategy), cohort)
    assert {block.block.name: block.values.item() for block in blocks} == {
        "w": 1,
        "norm.running_var": 1.25,
    }


@pytest.mark.parametrize(
    ("strategy", "parameters", "needed"),
    [
        ("krum", {"f": 2}, 7),
        ("multi-krum", {"f": 1, "keep": 8}, 9),
        ("bulyan", {"f": 2}, 11),
        ("trimmed-mean", {"trim": 0.1}, 10),
        ("nnm+median", {"f": 3}, 7),
        # 5 buckets of 2, the last of which has 1.
        ("bucketing+krum", {"f": 1}, 9),
        ("median", {}, 1),
    ],
)
def test_too_few_updates_are_a_sentence(
    tmp_path: Path, strategy: str, parameters: dict[str, float], needed: int
) -> None:
    """One update fewer than the rule needs is refused, exactly as many aren't."""
    updates = attacked()
    rule = find_strategy(strategy, parameters)
    assert rule.min_updates == needed
    aggregate(tmp_path, strategy, updates[:needed], parameters)
    if needed > 1:
        with pytest.raises(UnfitCohort, match=f"at least {needed} updates, but only {needed - 1}"):
            aggregate(tmp_path, strategy, updates[: needed - 1], parameters)


@pytest.mark.parametrize(
    "strategy", ["krum", "geometric-median", "nnm+median", "nnm+trimmed-mean", "bulyan"]
)
def test_threads_and_block_sizes_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """One thread of torch's or more, one of ours or three: the same bytes, also in float64."""
    generator = torch.Generator().manual_seed(1)
    rule = find_strategy(strategy, {})
    for num_updates in (7, 8, 11):
        # Of float64, as float32's rounding would hide in which order a sum was made.
        states = [
            {
                "v": torch.randn(100_003, generator=generator, dtype=torch.float64),
                "w": torch.randn(50_001, generator=generator),
            }
            for _ in range(num_updates + 1)
        ]
        kinds = dict.fromkeys(states[0], EntryKind.PARAMETER)
        cohort = cohort_of(tmp_path, states[0], states[1:], kinds=kinds)
        before = torch.get_num_threads()
        seen = set()
        try:
            for threads, of_ours in ((1, 1), (2, 1), (3, 3), (8, 2)):
                torch.set_num_threads(threads)
                monkeypatch.setattr(blocks, "_NUM_THREADS", of_ours)
                made = next_blocks(rule, cohort)
                seen.add(b"".join(block.values.numpy().tobytes() for block in made))
        finally:
            torch.set_num_threads(before)
        assert len(seen) == 1, num_updates


def never(*_: Any) -> None:  # noqa: ANN401
    """Stand where something must not be called."""
    raise AssertionError


def test_a_rule_without_distances_makes_no_pass_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Median, trimmed mean and buckets read the updates once."""
    monkeypatch.setattr("fedrounds.strategies.server_step.squared_distances", never)
    for strategy in ("median", "trimmed-mean", "uniform", "bucketing+median"):
        aggregate(tmp_path, strategy, attacked())

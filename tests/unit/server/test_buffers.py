"""Entries that aren't parameters: what a cohort's updates make of them, whatever the strategy."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrounds.strategies import StrategySettings
from fedrounds.strategies.blocks import BLOCK_ELEMENTS, Cohort
from fedrounds.strategies.buffers import RARITY, REACH, Bounded
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.types import EntryKind
from tests.factories import State, write_state

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "uniform": {},
    "median": {},
    "trimmed-mean": {},
    "krum": {},
    "multi-krum": {},
    "geometric-median": {},
    "centered-clipping": {},
    "clip": {},
    "nnm+median": {},
    "fednova": {},
    "fedbuff": {"buffer_size": 5},
    "fedavgm": {},
}


def next_state(
    folder: Path,
    base: State,
    updates: Sequence[State],
    kinds: Mapping[str, EntryKind],
    *,
    strategy: str = "fedavg",
    ties: Mapping[str, str] | None = None,
    variances: Set[str] = frozenset(),
) -> tuple[dict[str, Tensor], list[Bounded]]:
    """Return what a strategy makes of updates of equal weight, and what was bounded."""
    settings = StrategySettings(lr=0.1)
    chosen = find_strategy(strategy, STRATEGIES.get(strategy), settings=settings)
    files = [write_state(folder, state, num_examples=10) for state in updates]
    cohort = Cohort(
        base=write_state(folder, base),
        updates=[replace(file, num_steps=10) for file in files],
        kinds=kinds,
        ties=ties or {},
        variances=variances,
    )
    bounded: list[Bounded] = []
    state = {name: torch.empty_like(tensor).flatten() for name, tensor in base.items()}
    for made in next_blocks(chosen, cohort, on_bounded=bounded.append):
        begin, count = made.block.begin, made.block.count
        state[made.block.name][begin : begin + count] = made.values
    return {name: tensor.view(base[name].shape) for name, tensor in state.items()}, bounded


WEIGHT = {"w": EntryKind.PARAMETER}


def with_weight(**entries: Tensor) -> dict[str, Tensor]:
    """Return a state_dict with a parameter beside these entries."""
    return {"w": torch.ones(4), **entries}


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_buffer_that_is_the_same_everywhere_stays_bit_for_bit(
    tmp_path: Path, strategy: str, dtype: torch.dtype
) -> None:
    """A causal mask, a NaN, a minus zero, a third that no weighted sum gives back exactly."""
    mask = torch.triu(torch.full((5, 5), -math.inf, dtype=dtype), diagonal=1)
    mask[0, 0], mask[1, 0], mask[2, 0], mask[3, 0] = math.nan, -0.0, 1 / 3, math.inf
    state = with_weight(mask=mask)
    result, bounded = next_state(
        *(tmp_path, state, [state] * 5, WEIGHT | {"mask": EntryKind.MEAN}), strategy=strategy
    )
    assert bits(result["mask"]) == bits(mask)
    assert not bounded


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_of_five_clients_cannot_ruin_a_running_mean(tmp_path: Path, strategy: str) -> None:
    """1e30, or what overflows a square: the mean moves by a bounded part of the values' own size.

    The bad update counts as one that goes from the global model, which is free, by REACH times the
    clients' usual distance from their median or by the usual norm; a fifth of that is in the mean.
    """
    draws = torch.Generator().manual_seed(1)
    centre = 3 + torch.randn(16, generator=draws, dtype=torch.float64)
    honest = [centre + 0.1 * torch.randn(16, generator=draws).double() for _ in range(4)]
    base = with_weight(mean=torch.zeros(16, dtype=torch.float64))
    kinds = WEIGHT | {"mean": EntryKind.MEAN}
    for bad in (1e30, -1e300):
        spoilt = torch.full((16,), bad, dtype=torch.float64)
        updates = [with_weight(mean=mean) for mean in [*honest, spoilt]]
        result, bounded = next_state(tmp_path, base, updates, kinds, strategy=strategy)
        truth = torch.stack(honest).mean(dim=0)
        limit = max(REACH * 0.1 * 16**0.5, float(centre.norm()))
        assert float((result["mean"] - truth).norm()) <= 1.1 * (float(centre.norm()) + limit) / 5
        assert [(bound.update, bound.name) for bound in bounded] == [(4, "mean")]


def test_scanners_whose_scales_differ_by_orders_of_magnitude_count(tmp_path: Path) -> None:
    """No majority agrees on a scale, so the plain mean stands: nothing is bounded."""
    draws = torch.Generator().manual_seed(2)
    shape = torch.rand(16, generator=draws) + 0.5
    updates = [with_weight(mean=shape * scale) for scale in (1.0, 30.0, 100.0, 300.0, 1000.0)]
    base = with_weight(mean=torch.zeros(16))
    result, bounded = next_state(tmp_path, base, updates, WEIGHT | {"mean": EntryKind.MEAN})
    assert not bounded
    torch.testing.assert_close(result["mean"], shape * (1431 / 5))


def test_an_honest_cohort_is_averaged_as_before(tmp_path: Path) -> None:
    """Nothing is bounded, and the mean of clients with the same weight is the plain one."""
    draws = torch.Generator().manual_seed(3)
    kinds = WEIGHT | {"var": EntryKind.MEAN, "few": EntryKind.MEAN}
    base = with_weight(var=torch.ones(64), few=torch.ones(2))
    for num_clients in (1, 2, 3, 5, 20):
        updates = [
            with_weight(
                var=1 + torch.rand(64, generator=draws), few=1 + torch.rand(2, generator=draws)
            )
            for _ in range(num_clients)
        ]
        result, bounded = next_state(tmp_path, base, updates, kinds)
        assert not bounded
        for name in ("var", "few"):
            expected = (
                torch.stack([update[name] for update in updates]).double().mean(dim=0).float()
            )
            assert torch.equal(result[name], expected)


def test_a_client_that_took_one_step_only_is_not_bounded(tmp_path: Path) -> None:
    """It lies between the global model and the others, however close these are to each other."""
    kinds = WEIGHT | {"mean": EntryKind.MEAN}
    base = with_weight(mean=torch.zeros(8))
    far = [with_weight(mean=torch.full((8,), value)) for value in (100.0, 100.1, 100.2, 100.3)]
    _, bounded = next_state(tmp_path, base, [*far, with_weight(mean=torch.full((8,), 1.0))], kinds)
    assert not bounded


def test_an_entry_that_most_clients_leave_alone_is_a_constant(tmp_path: Path) -> None:
    """One of five changes a table of positions: it stays, and nobody is named for it."""
    table = torch.linspace(-1, 1, BLOCK_ELEMENTS + 3)
    base = with_weight(table=table)
    for changed in (table * 1.1, table + 1, table + 1e30):
        result, bounded = next_state(
            tmp_path,
            base,
            [base] * 4 + [with_weight(table=changed)],
            WEIGHT | {"table": EntryKind.MEAN},
        )
        assert bits(result["table"]) == bits(table)
        assert not bounded


NUM_DRAWS = 200
SMALL_COHORTS = [(3, 1), (3, 2), (3, 8), (4, 1), (5, 1), (5, 3), (7, 1)]
"""Numbers of clients, and of elements in an entry."""


@pytest.mark.parametrize("has_heavy_tails", [False, True])
@pytest.mark.parametrize(("num_clients", "size"), SMALL_COHORTS)
def test_small_entries_of_few_honest_clients_are_never_bounded(
    tmp_path: Path, num_clients: int, size: int, has_heavy_tails: bool
) -> None:
    """Two hundred entries of independent honest values, about a global model of 0: no false alarm.

    Two of three scalars lie ten times nearer to each other than the third in one draw of ten.
    """
    draws = torch.Generator().manual_seed(100 * num_clients + 10 * size + has_heavy_tails)

    def draw() -> Tensor:
        values = torch.randn(size, generator=draws)
        if has_heavy_tails:
            values = values * torch.randn(size, generator=draws)
        return values

    names = [f"b{number}" for number in range(NUM_DRAWS)]
    _, bounded = next_state(
        tmp_path,
        with_weight(**{name: torch.zeros(size) for name in names}),
        [with_weight(**{name: draw() for name in names}) for _ in range(num_clients)],
        WEIGHT | dict.fromkeys(names, EntryKind.MEAN),
    )
    assert bounded == []


@pytest.mark.parametrize("num_clients", [5, 12])
def test_honest_clients_whose_variances_differ_are_not_named(
    tmp_path: Path, num_clients: int
) -> None:
    """Each has a scale of its own, log-normal: some are shortened, which is no incident."""
    draws = torch.Generator().manual_seed(num_clients)

    def draw() -> dict[str, Tensor]:
        return {
            name: torch.exp(torch.randn(1, generator=draws) + 0.3 * torch.randn(8, generator=draws))
            for name in names
        }

    names = [f"b{number}" for number in range(NUM_DRAWS)]
    updates = [with_weight(**draw()) for _ in range(num_clients)]
    result, bounded = next_state(
        tmp_path,
        with_weight(**{name: torch.zeros(8) for name in names}),
        updates,
        WEIGHT | dict.fromkeys(names, EntryKind.MEAN),
    )
    assert bounded == []
    plain = {name: torch.stack([update[name] for update in updates]).mean(dim=0) for name in names}
    assert any(not torch.allclose(result[name], plain[name]) for name in names)


@pytest.mark.parametrize(("num_clients", "size"), SMALL_COHORTS)
def test_a_small_entry_of_1e30_is_bounded_however_few_clients_there_are(
    tmp_path: Path, num_clients: int, size: int
) -> None:
    """In proportion to how far the others lie apart, and only its sender is named."""
    draws = torch.Generator().manual_seed(num_clients + size)
    updates = [
        with_weight(mean=torch.randn(size, generator=draws).double())
        for _ in range(num_clients - 1)
    ]
    spoilt = with_weight(mean=torch.full((size,), 1e30, dtype=torch.float64))
    result, bounded = next_state(
        tmp_path,
        with_weight(mean=torch.zeros(size, dtype=torch.float64)),
        [*updates, spoilt],
        WEIGHT | {"mean": EntryKind.MEAN},
    )
    assert [bound.update for bound in bounded] == [num_clients - 1]
    # k = size * (num_clients // 2) coincidences: the width, here times a distance of at most 5.
    width = REACH * RARITY ** (1 / (size * (num_clients // 2)))
    assert float(result["mean"].abs().max()) < 5 * width


def test_rows_that_only_some_clients_change_are_averaged(tmp_path: Path) -> None:
    """Prototypes of classes: each client changes its own two rows of ten, and all of them count."""
    kinds = WEIGHT | {"rows": EntryKind.MEAN}
    base = with_weight(rows=torch.zeros(10, 4))
    updates = []
    for client in range(5):
        rows = torch.zeros(10, 4)
        rows[2 * client : 2 * client + 2] = 1.0
        updates.append(with_weight(rows=rows))
    result, bounded = next_state(tmp_path, base, updates, kinds)
    assert not bounded
    assert torch.equal(result["rows"], torch.full((10, 4), 0.2))


def test_a_value_that_is_infinite_at_first_becomes_the_mean_of_all(tmp_path: Path) -> None:
    """An observer's minimum begins at +inf; it stays so until every client has a number for it."""
    kinds = WEIGHT | {"smallest": EntryKind.MEAN}
    base = with_weight(smallest=torch.tensor([math.inf, math.inf]))
    updates = [
        with_weight(smallest=torch.tensor([float(number), math.inf if number == 2 else 0.0]))
        for number in (1, 2, 3)
    ]
    result, _ = next_state(tmp_path, base, updates, kinds)
    assert result["smallest"].tolist() == [2.0, math.inf]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-6])
@pytest.mark.parametrize("kind", [EntryKind.MEAN, EntryKind.MAX])
def test_an_entry_with_an_impossible_value_does_not_count(
    tmp_path: Path, strategy: str, bad: float, kind: EntryKind
) -> None:
    """Not its other elements either: four of five clients hold 1 and 4, the fifth 1000 and `bad`.

    It is reported; the rest of its update counts.
    """
    base = with_weight(var=torch.full((2,), 0.5))
    honest = with_weight(var=torch.tensor([1.0, 4.0]))
    updates = [honest] * 4 + [{"w": torch.full((4,), 2.0), "var": torch.tensor([1000.0, bad])}]
    result, bounded = next_state(
        *(tmp_path, base, updates, WEIGHT | {"var": kind}), strategy=strategy, variances={"var"}
    )
    assert result["var"].tolist() == [1.0, 4.0]
    (entry,) = bounded
    assert (entry.update, entry.name, entry.share) == (4, "var", 0.0)
    assert str(entry.impossible) == str(float(torch.tensor(bad)))
    if strategy == "fedavg":
        assert result["w"].tolist() == pytest.approx([1.2] * 4)


def test_a_negative_value_is_impossible_for_running_variances_alone(tmp_path: Path) -> None:
    """An average of log variances is honestly negative, whatever its name."""
    kinds = WEIGHT | {"log_running_var": EntryKind.MEAN}
    base = with_weight(log_running_var=torch.zeros(2))
    updates = [with_weight(log_running_var=torch.full((2,), -value)) for value in (1.0, 2.0, 3.0)]
    result, bounded = next_state(tmp_path, base, updates, kinds, variances={"norm.running_var"})
    assert result["log_running_var"].tolist() == [-2.0, -2.0]
    assert not bounded


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [EntryKind.MEAN, EntryKind.MAX])
def test_an_entry_that_is_impossible_in_all_updates_stays(
    tmp_path: Path, strategy: str, kind: EntryKind
) -> None:
    """A float16 counter that overflows everywhere: the global model's value is the last good value.

    It stands at 60000, far from 65504, the largest of float16.
    """
    base = with_weight(seen=torch.tensor(60000.0, dtype=torch.float16))
    update = with_weight(seen=torch.tensor(math.inf, dtype=torch.float16))
    for num_updates in (1, 2, 5):
        result, bounded = next_state(
            *(tmp_path, base, [update] * num_updates, WEIGHT | {"seen": kind}),
            strategy="fedavg" if num_updates < 5 else strategy,
        )
        assert result["seen"].item() == 60000
        assert len(bounded) == num_updates


def test_what_stands_in_for_an_entry_is_the_middle_of_the_others(tmp_path: Path) -> None:
    """Of three clients with equal weight one has a NaN: the mean is that of the other two."""
    kinds = WEIGHT | {"mean": EntryKind.MEAN}
    updates = [with_weight(mean=torch.full((3,), value)) for value in (1.0, math.nan, 4.0)]
    result, _ = next_state(tmp_path, with_weight(mean=torch.zeros(3)), updates, kinds)
    assert result["mean"].tolist() == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_counters_take_the_maximum_and_constants_stay(tmp_path: Path, strategy: str) -> None:
    """Integers, booleans and declared floats, whatever the strategy; the base counts in a maximum.

    A local entry in an update holds the global value; any other value changes nothing.
    """
    kinds = WEIGHT | {
        "steps": EntryKind.MAX,
        "seen": EntryKind.MAX,
        "largest": EntryKind.MAX,
        "queue": EntryKind.KEEP,
        "mask": EntryKind.KEEP,
        "head": EntryKind.LOCAL,
    }

    def state(number: int) -> dict[str, Tensor]:
        return with_weight(
            steps=torch.tensor(number),
            seen=torch.tensor([number == 2, number == 3, False]),
            largest=torch.tensor([-math.inf, math.nan]) if number == 0 else torch.ones(2) * number,
            queue=torch.tensor([number], dtype=torch.int32),
            mask=torch.tensor([number > 0]),
            head=torch.full((2,), float(number)),
        )

    base = state(0) | {"steps": torch.tensor(4)}
    result, bounded = next_state(
        tmp_path, base, [state(number) for number in range(1, 6)], kinds, strategy=strategy
    )
    assert not bounded
    assert result["steps"].item() == 5
    assert result["seen"].tolist() == [True, True, False]
    assert result["largest"].tolist() == [5.0, 5.0]
    assert result["queue"].item() == 0
    assert result["mask"].item() is False
    assert result["head"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("strategy", ["fedavg", "median", "uniform", "fedbuff"])
def test_an_integer_that_is_declared_mean_is_rounded_to_the_nearest(
    tmp_path: Path, strategy: str
) -> None:
    """The mean of 10, 11, 13, 14 and 14 is 12.4, their median 13; an int8 never overflows."""
    kinds = WEIGHT | {"count": EntryKind.MEAN}
    base = with_weight(count=torch.tensor([0, 0], dtype=torch.int8))
    updates = [
        with_weight(count=torch.tensor([count, 127], dtype=torch.int8))
        for count in (10, 11, 13, 14, 14)
    ]
    result, _ = next_state(tmp_path, base, updates, kinds, strategy=strategy)
    assert result["count"].tolist() == [13 if strategy == "median" else 12, 127]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_entries_stay_the_same_whatever_an_update_holds(tmp_path: Path, strategy: str) -> None:
    """The first entry's values count for both, so that the model can exist."""
    draws = torch.Generator().manual_seed(5)

    def state() -> dict[str, Tensor]:
        return {name: torch.randn(7, generator=draws) for name in ("first", "second")}

    kinds = dict.fromkeys(("first", "second"), EntryKind.PARAMETER)
    base = dict.fromkeys(("first", "second"), torch.zeros(7))
    result, _ = next_state(
        *(tmp_path, base, [state() for _ in range(5)], kinds),
        strategy=strategy,
        ties={"second": "first"},
    )
    assert bits(result["first"]) == bits(result["second"])
    assert result["first"].any()

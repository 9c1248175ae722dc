"""FedBuff's step: against the paper's formula written out, and what must hold for any buffer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrounds.errors import InvalidInput
from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import decode_state
from fedrounds.tensors.entries import entry_kinds
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints
from fedserver.server import run_server
from fedserver.settings import ServerSettings
from tests.factories import State, TinyNet, write_state

KINDS = entry_kinds(TinyNet())


@dataclass(frozen=True)
class Arrived:
    """An update of a buffer: `base` is the model it began with, None for the newest."""

    state: State
    num_examples: int
    base: State | None = None
    staleness: int = 0


def step(
    folder: Path, base: State, buffer: Sequence[Arrived], *, name: str = "fedbuff", **given: float
) -> dict[str, Tensor]:
    """Return the model that a strategy makes of a buffer."""
    folder.mkdir(exist_ok=True)
    start = write_state(folder, base)
    updates = []
    for number, arrived in enumerate(buffer):
        subfolder = folder / f"{number}"
        subfolder.mkdir(exist_ok=True)
        own_base = None if arrived.base is None else write_state(subfolder, arrived.base)
        file = write_state(subfolder, arrived.state, num_examples=arrived.num_examples)
        updates.append(replace(file, base=own_base, staleness=arrived.staleness))
    strategy = find_strategy(name, given)
    cohort = Cohort(base=start, updates=updates, kinds=KINDS)
    made = Checkpoints(folder / "models", KINDS).save(start, next_blocks(strategy, cohort))
    return decode_state(made.file.path.read_bytes())


def drawn(seed: int) -> dict[str, Tensor]:
    """Return a model: parameters anywhere, variances above 0, a counter, fixed entries."""
    generator = torch.Generator().manual_seed(seed)
    state = TinyNet().state_dict()
    for name, tensor in state.items():
        if KINDS[name] in (EntryKind.PARAMETER, EntryKind.MEAN):
            values = torch.randn(tensor.shape, generator=generator)
            state[name] = values.abs() if name.endswith("var") else values
        elif KINDS[name] is EntryKind.MAX:
            state[name] = tensor + seed
    state["head.weight"] = state["fc.weight"]
    return state


def expected(
    base: State, buffer: Sequence[Arrived], *, exponent: float, by_examples: bool
) -> dict[str, Tensor]:
    """Return algorithm 1's model, entry by entry, from float64 tensors as a whole."""
    made = {}
    for name, kind in KINDS.items():
        now = base[name].double()
        if kind is EntryKind.KEEP:
            made[name] = base[name]
        elif kind is EntryKind.MAX:
            made[name] = torch.stack(
                [base[name], *(arrived.state[name] for arrived in buffer)]
            ).amax(0)
        else:
            is_parameter = kind is EntryKind.PARAMETER
            counts = [
                arrived.num_examples if by_examples or not is_parameter else 1 for arrived in buffer
            ]
            total = torch.zeros_like(now)
            for arrived, count in zip(buffer, counts, strict=True):
                factor = 1 / (1 + arrived.staleness) ** exponent
                began = base if arrived.base is None else arrived.base
                reference = began[name].double() if is_parameter else now
                total += count * factor * (arrived.state[name].double() - reference)
            made[name] = (now + total / sum(counts)).to(base[name].dtype)
    return made


BUFFER = (
    Arrived(drawn(2), 10),
    Arrived(drawn(3), 40, base=drawn(4), staleness=3),
    Arrived(drawn(5), 5, base=drawn(6), staleness=8),
)


@pytest.mark.parametrize("by_examples", [False, True])
@pytest.mark.parametrize("exponent", [0.5, 0.0, 2.0])
def test_a_step_is_the_papers_formula(tmp_path: Path, exponent: float, by_examples: bool) -> None:
    """Deltas from each own base, weighted by its staleness, divided by the buffer's size."""
    base = drawn(1)
    made = step(
        *(tmp_path, base, BUFFER),
        staleness_exponent=exponent,
        by_examples=by_examples,
    )
    wanted = expected(base, BUFFER, exponent=exponent, by_examples=by_examples)
    for name, tensor in wanted.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-6, atol=1e-7)
    again = step(
        *(tmp_path / "again", base, BUFFER),
        staleness_exponent=exponent,
        by_examples=by_examples,
    )
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_a_server_optimizer_follows_the_buffers_mean_delta(tmp_path: Path) -> None:
    """The paper's server rate: plain SGD at the server with half the rate goes half as far."""
    base = drawn(1)
    whole = step(tmp_path, base, BUFFER)
    half = step(
        *(tmp_path / "half", base, BUFFER),
        name="fedbuff+fedavgm",
        server_lr=0.5,
        server_momentum=0.0,
    )
    for name, kind in KINDS.items():
        if kind is EntryKind.PARAMETER:
            middle = (base[name].double() + whole[name].double()) / 2
            torch.testing.assert_close(half[name].double(), middle, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(half[name], whole[name])


arrivals = st.lists(
    st.tuples(st.integers(1, 2**29 - 1), st.integers(0, 1000)), min_size=1, max_size=5
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arrivals, st.floats(0, 4), st.booleans())
def test_whatever_comes_the_step_stays_within_what_it_is_made_of(
    tmp_path: Path, arrived: list[tuple[int, int]], exponent: float, by_examples: bool
) -> None:
    """Staleness only ever shortens it, buffers stay between their values, variances above 0.

    Without staleness it is the plain mean, that of fedavg where num_examples count.
    """
    base = drawn(1)
    buffer = [
        Arrived(drawn(seed), count, base=drawn(100 + seed) if stale else None, staleness=stale)
        for seed, (count, stale) in enumerate(arrived, start=2)
    ]

    def step_of(arrived: Sequence[Arrived]) -> dict[str, Tensor]:
        return step(
            *(tmp_path, base, arrived), staleness_exponent=exponent, by_examples=by_examples
        )

    made = step_of(buffer)
    for name, kind in KINDS.items():
        if kind is EntryKind.PARAMETER:
            lengths = [
                (arrived.state[name] - (arrived.base or base)[name]).abs() for arrived in buffer
            ]
            longest = torch.stack(lengths).amax(0)
            assert bool(((made[name] - base[name]).abs() <= longest + 1e-5).all())
        elif kind is EntryKind.MEAN:
            values = torch.stack([base[name], *(arrived.state[name] for arrived in buffer)])
            assert bool((made[name] >= values.amin(0) - 1e-6).all())
            assert bool((made[name] <= values.amax(0) + 1e-6).all())
    fresh = [replace(arrived, base=None, staleness=0) for arrived in buffer]
    mean = step_of(fresh)
    plain = step(tmp_path, base, fresh, name="fedavg" if by_examples else "uniform")
    for name, kind in KINDS.items():
        # Robust rules take the buffers' plain mean.
        if kind is EntryKind.PARAMETER or by_examples:
            torch.testing.assert_close(mean[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"buffer_size": 0.0}, "buffer_size is 0; it must be 1 to"),
        ({"staleness_exponent": -1.0}, "staleness_exponent is -1; it must be 0 or above"),
    ],
)
def test_a_senseless_number_is_refused(parameters: dict[str, float], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        find_strategy("fedbuff", parameters)


@pytest.mark.parametrize("name", ["nnm+fedbuff", "fedbuff+krum", "median+fedbuff"])
def test_robust_rules_do_not_go_with_it(name: str) -> None:
    """They compare models that began alike."""
    with pytest.raises(InvalidInput, match=r"more than one aggregator|use uniform or a robust"):
        find_strategy(name)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"clients_per_round": 3},
            "is asynchronous, .* leave out --clients-per-round, say how many",
        ),
        ({"min_updates": 1}, "leave out --min-updates"),
        ({"require_all": True}, "leave out --require-all"),
        ({"round_deadline": 9.0}, "leave out --round-deadline"),
        ({"stragglers": 0.5}, "leave out --stragglers"),
        ({"strategy": "median", "concurrency": 4}, "are of asynchronous strategies alone"),
        ({"max_staleness": 3, "strategy": "fedavg"}, "are of asynchronous strategies alone"),
    ],
)
def test_settings_that_make_no_sense_with_it_are_refused(
    tmp_path: Path, given: dict[str, Any], match: str
) -> None:
    """In a sentence, before a run is begun."""
    state_dir = tmp_path / "server"
    flags: dict[str, Any] = {"strategy": "fedbuff", "task": "tests.tiny_task:tiny"}
    with pytest.raises(InvalidInput, match=match):
        run_server(ServerSettings(**(flags | given), state_dir=state_dir))
    assert not state_dir.exists()

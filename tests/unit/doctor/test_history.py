"""How far back a training can go, and what is kept for it."""

from itertools import pairwise

import torch

from fedrounds.doctor.history import Snapshot, StepHistory

INTERVAL = 8


def state(step: int, *, num_floats: int = 1) -> Snapshot:
    """Return a state of so many floats after a step."""
    tensors = [torch.zeros(num_floats)]
    return Snapshot(step=step, tensors=tensors, optimizer_state=[], groups=[], scheduler_state=None)


def ages_after(num_steps: int, *, memory_bytes: int = 2**20) -> list[int]:
    """Return the ages of the states kept after so many steps, the oldest first."""
    history = StepHistory(memory_bytes=memory_bytes)
    for step in range(0, num_steps + 1, INTERVAL):
        history.keep(state(step))
    return [num_steps - snapshot.step for snapshot in history.snapshots]


def test_the_last_128_steps_can_always_be_undone() -> None:
    for num_steps in range(0, 1600, INTERVAL):
        oldest, *others = ages_after(num_steps)
        assert oldest >= min(num_steps, 128)
        # The oldest goes as soon as the next one is old enough.
        assert not others or others[0] < 128


def test_states_get_rarer_with_age() -> None:
    """About nine states reach over 128 steps; those of the last 24 are all kept."""
    for num_steps in range(0, 1600, INTERVAL):
        ages = ages_after(num_steps)
        assert len(ages) <= 10
        assert {0, INTERVAL, 2 * INTERVAL} <= set(ages) or num_steps < 2 * INTERVAL
        for older, newer in pairwise(ages):
            assert older - newer <= max(INTERVAL, 0.75 * newer + INTERVAL)


def test_the_memory_bound_holds_before_the_reach() -> None:
    """Each state is four bytes: four of them fit in sixteen."""
    assert len(ages_after(400, memory_bytes=16)) <= 4
    assert ages_after(400, memory_bytes=16)[-1] == 0


def test_a_pinned_state_stays_whatever_its_age() -> None:
    history = StepHistory(memory_bytes=2**20)
    history.keep(state(0))
    pinned = state(8)
    history.keep(pinned)
    history.pin(pinned)
    for step in range(16, 800, INTERVAL):
        history.keep(state(step))
    assert history.has_pinned()
    assert history.snapshots[0].step == 8

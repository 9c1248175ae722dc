"""Noticing that something else writes into a training between two of its steps.

PyTorch counts the writes into each tensor (`Tensor._version`). Counts that differ from those at the
end of the step before show a callback, or a checkpoint that was loaded. A write through
`Tensor.data` isn't counted.
"""

from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from fedrounds.doctor.stepping import TrainingState


class Written(StrEnum):
    """The part of a training that was written into."""

    WEIGHTS = "weights"
    OPTIMIZER_STATE = "optimizer-state"


class Versions(NamedTuple):
    """Each tensor's identity and its number of writes."""

    weights: list[tuple[int, int]]
    optimizer_state: list[tuple[int, int]]


def versions_of(training: TrainingState) -> Versions:
    """Return the versions of the learned weights and of the optimizer's tensors."""
    return Versions(
        weights=[(id(one), one._version) for one in training.learning],
        optimizer_state=[
            (id(one), one._version)
            for state in training.optimizer.state.values()
            for one in state.values()
            if isinstance(one, Tensor)
        ],
    )


def written_between(before: Versions, after: Versions) -> frozenset[Written]:
    """Return the parts whose versions differ."""
    written = set()
    if before.weights != after.weights:
        written.add(Written.WEIGHTS)
    if before.optimizer_state != after.optimizer_state:
        written.add(Written.OPTIMIZER_STATE)
    return frozenset(written)

"""Noticing that something else writes into a training between two of its steps.

PyTorch counts the writes into each tensor (`Tensor._version`). Counts that differ from those at the
end of the step before show a callback, or a checkpoint that was loaded. A write through
`Tensor.data` isn't counted.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor

from fedrounds.doctor.stepping import TrainingState


class Written(StrEnum):
    """The part of a training that was written into."""

    WEIGHTS = "weights"
    OPTIMIZER_STATE = "optimizer-state"


class OutsideWrites:
    """Knows the number of writes into each tensor at the end of a step.

    This costs a part of every step, so the optimizer's tensors are listed anew only where its state
    or the state of its first weight is another object. What replaces a single tensor isn't noticed.
    """

    def __init__(self) -> None:
        self._weights: list[int] = []
        self._state: object = None
        self._first: object = None
        self._num = 0
        self._tensors: list[Tensor] = []
        self._counts: list[int] = []

    def note(self, training: TrainingState) -> None:
        """Note how things are at the end of a step."""
        if self._is_replaced(training):
            state = training.optimizer.state
            self._state, self._first, self._num = state, _first_of(state), len(state)
            self._tensors = [
                value
                for values in state.values()
                for value in values.values()
                if isinstance(value, Tensor)
            ]
        self._weights = [parameter._version for parameter in training.learning]
        self._counts = [tensor._version for tensor in self._tensors]

    def since_noted(self, training: TrainingState) -> frozenset[Written]:
        """Return the parts that were written into since then."""
        written = set()
        if self._weights != [parameter._version for parameter in training.learning]:
            written.add(Written.WEIGHTS)
        if self._is_replaced(training) or self._counts != [
            tensor._version for tensor in self._tensors
        ]:
            written.add(Written.OPTIMIZER_STATE)
        return frozenset(written)

    def _is_replaced(self, training: TrainingState) -> bool:
        state = training.optimizer.state
        is_same = self._state is state and self._num == len(state)
        return not is_same or self._first is not _first_of(state)


def _first_of(state: Mapping[Any, object]) -> object:
    return next(iter(state.values()), None)

"""Going back: the recorded steps since a state taken again under other overrides."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrounds.diagnosis.values import Remedy, RemedyKind
from fedrounds.doctor import interventions
from fedrounds.doctor.findings import Finding
from fedrounds.doctor.history import (
    Recorded,
    Snapshot,
    StepHistory,
    device_of,
    is_finite,
    restore_settings,
    restore_snapshot,
    take_snapshot,
)
from fedrounds.doctor.monitor import Monitor
from fedrounds.doctor.remedies import applied
from fedrounds.doctor.stepping import Overrides, StepOutcome, TrainingState, take_step
from fedrounds.doctor.suspicion import SUSPICIONS, last_level

Preparation = Callable[[], None]
"""Changes the state that the steps begin with."""


def nothing() -> None:
    """Change nothing."""


@dataclass(frozen=True, kw_only=True)
class Retaking:
    """The training, the steps up to now, and the callback for each step that is taken again."""

    training: TrainingState
    steps: Sequence[Recorded]
    on_replay: Callable[[], None]

    def commit(
        self,
        start: Snapshot,
        treatment: Overrides,
        history: StepHistory,
        monitor: Monitor,
        *,
        prepare: Preparation = nothing,
        is_strict: bool = False,
    ) -> StepOutcome | None:
        """Take the steps since `start` again and keep them in history and monitor.

        Returns:
            How the newest step went; None where a step fails, or with `is_strict` is suspicious.
        """
        restore_snapshot(self.training, start)
        prepare()
        monitor.rewind(start.step)
        history.rewind(start.step)
        history.keep(take_snapshot(self.training, step=start.step))
        outcome = StepOutcome(is_taken=False)
        for recorded in self._since(start):
            outcome = self._take(recorded, treatment)
            history.record(
                recorded._replace(treatment=treatment, outcome=outcome.without_tensors()),
            )
            symptom = monitor.examine_step(outcome, step=recorded.step)
            if symptom is not None and (is_strict or symptom not in SUSPICIONS):
                return None
        return outcome if is_finite(self.training) else None

    def level_from(
        self, start: Snapshot, treatment: Overrides, *, prepare: Preparation = nothing
    ) -> float:
        """Return the loss of the last steps, taken again from a state; infinite if a step fails."""
        restore_snapshot(self.training, start)
        prepare()
        losses = []
        for recorded in self._since(start):
            outcome = self._take(recorded, treatment)
            if not outcome.is_finite:
                return math.inf
            if outcome.is_taken:
                losses.append(outcome.loss)
        return last_level(losses) if is_finite(self.training) else math.inf

    def update_from(
        self, start: Snapshot, treatment: Overrides, *, prepare: Preparation = nothing
    ) -> list[Tensor]:
        """Return by how much the first step after a state moves each weight, in float64."""
        restore_snapshot(self.training, start)
        prepare()
        learning = self.training.learning
        before = [weight.detach().to(torch.float64, copy=True) for weight in learning]
        self._take(self._since(start)[0], treatment)
        return [
            weight.detach().double() - old for weight, old in zip(learning, before, strict=True)
        ]

    def level_under(self, remedy: Remedy, finding: Finding, treatment: Overrides) -> float:
        """Return the loss that the steps up to now lead to under one more remedy."""
        return self.level_from(
            finding.return_to,
            applied(treatment, remedy, finding),
            prepare=preparation(self.training, remedy),
        )

    def level_of_fresh_weights(
        self, start: Snapshot, fresh: Mapping[str, Tensor], treatment: Overrides
    ) -> float:
        """Return the loss that the steps up to now lead to from other weights at `start`."""
        return self.level_from(
            start,
            treatment,
            prepare=lambda: interventions.load_weights(self.training, fresh),
        )

    def live_level(self) -> float:
        """Return the loss that the steps came to as they were taken."""
        return last_level(
            [recorded.outcome.loss for recorded in self.steps if recorded.outcome.is_taken]
        )

    def _since(self, start: Snapshot) -> list[Recorded]:
        return [recorded for recorded in self.steps if recorded.step > start.step]

    def _take(self, recorded: Recorded, treatment: Overrides) -> StepOutcome:
        recorded.random_state.restore(device_of(self.training))
        restore_settings(self.training, recorded)
        outcome = take_step(
            self.training,
            recorded.batch,
            treatment,
            step=recorded.step,
            updates=recorded.updates,
        )
        self.on_replay()
        return outcome


def preparation(training: TrainingState, remedy: Remedy) -> Preparation:
    """Return what a remedy changes about the state that it begins with."""
    if remedy.kind is RemedyKind.USE_FLOAT32:
        return lambda: interventions.widen(training)
    if remedy.kind is RemedyKind.RESET_OPTIMIZER:
        return lambda: interventions.forget_history(training)
    return nothing

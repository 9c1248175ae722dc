"""The bad step of a case, the state before it, and experiments on it alone."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedrounds.diagnosis.values import (
    Experiment,
    ExperimentName,
    Origin,
    StepPhase,
    SuspectSample,
    Symptom,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import (
    Batch,
)
from fedrounds.doctor.findings import Case
from fedrounds.doctor.history import (
    Recorded,
    device_of,
    restore_snapshot,
)
from fedrounds.doctor.locate import locate, locate_error
from fedrounds.doctor.replay import Change, Replay, Trajectory
from fedrounds.doctor.stepping import descend, prepared, treated
from fedrounds.doctor.trials import Trials

_MODERATE = 1e9
"""What is computed from numbers below this has no excuse to overflow."""
_NUM_HEALTHY = 8
_SPIKE = 100.0
_SPOILT = 1.5
_WORTH = 0.3
"""A loss below this share of the first one is nothing to worry about."""


class Evidence:
    """One case on the table: where it went wrong, and what was tried."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._symptom = case.symptom
        self._training = case.training
        self._history = case.history
        self._noticed = case.history.steps[-1]
        self._replay = Replay(
            case.training,
            case.history,
            level=case.level,
            needs_gradient=case.symptom is Symptom.DEAD_NETWORK,
            on_replay=case.on_replay,
        )
        self._experiments: list[Experiment] = []
        self._trials = Trials(self._replay, self._experiments)
        self._samples: tuple[SuspectSample, ...] = ()
        self._num_samples = 0
        self._max_input = math.inf
        self._trajectory: Trajectory | None = None
        self._bad = self._failed = self._noticed
        self._before = self._start = case.history.snapshots[-1]
        self._origin = Origin(phase=StepPhase.INPUT)
        self._largest_input = 0.0
        self._mixes_dtypes = False

    def _find_onset(self) -> None:
        """Find the first step that harmed the model, and the last good state before it.

        Where the bad value came up stays what was found, unless no value was bad at all.
        """
        restore_snapshot(self._training, self._before)
        if self._replay.is_sane():
            return
        for snapshot in reversed(self._history.snapshots):
            self._start = snapshot
            restore_snapshot(self._training, snapshot)
            if self._replay.is_sane():
                break
        self._trajectory = self._replay.run(self._start, self._failed.step, is_watched=True)
        self._bad = self._recorded(self._trajectory.failed_at or self._failed.step)
        self._before = self._trajectory.before
        if not self._has_come_up():
            self._failed = self._bad

    def _has_spoilt(self, trajectory: Trajectory) -> bool:
        """Whether a gradient far beyond the usual ones has undone a part of what was learned."""
        usual, norm = self._case.usual_norm, trajectory.steps[-1].outcome.grad_norm
        if usual is None or norm is None or not norm > _SPIKE * usual:
            return False
        after = self._replay.probe_loss()
        restore_snapshot(self._training, trajectory.before)
        allowed = max(_SPOILT * abs(self._replay.probe_loss()), _WORTH * abs(self._case.level))
        if not after > allowed:
            return False
        self._replay.allowed = allowed
        return True

    def _recorded(self, step: int) -> Recorded:
        return next(one for one in self._history.steps if one.step == step)

    def _locate(self) -> None:
        """Find where the first bad value comes up in the bad step."""
        bad, training = self._bad, self._training
        batch = prepared(bad.batch, bad.treatment, num_classes=training.num_classes)
        self._origin = Origin(phase=_QUIET_PHASES.get(self._symptom, StepPhase.LOSS))
        if batch is None:
            return

        def compute_loss(model: torch.nn.Module, one: Batch) -> Tensor | tuple[Tensor, Tensor]:
            with treated(bad.treatment):
                return training.compute_loss(model, one)

        restore_snapshot(training, self._before)
        bad.random_state.restore(device_of(training))
        self._replay.count_step()
        if bad.outcome.error is not None or self._symptom is Symptom.LABEL_OUT_OF_RANGE:
            raised = locate_error(training.model, batch, compute_loss)
            if raised is not None:
                self._origin = raised.origin
                self._mixes_dtypes = raised.mixes_dtypes
            return
        found = locate(
            training.model,
            batch,
            compute_loss,
            optimizer_step=lambda: descend(training, bad.treatment, step=bad.step),
        )
        if found is not None:
            self._origin = found.origin
            self._largest_input = found.largest_input

    def _has_come_up(self) -> bool:
        """Whether a number of the bad step isn't finite."""
        return self._origin.num_nan + self._origin.num_inf > 0

    def _is_loss_suspect(self) -> bool:
        """Whether the loss made a bad value of numbers that are no reason for one."""
        origin = self._origin
        is_in_loss = origin.phase is StepPhase.LOSS or (
            origin.phase is StepPhase.BACKWARD and not origin.module
        )
        return is_in_loss and self._has_come_up() and self._largest_input <= _MODERATE

    def _guarded_step_goes_well(self) -> bool:
        return self._replay.goes_well(
            self._before, self._bad, self._bad.batch, change=interventions.guarding_loss()
        )

    def _step_is_finite(self, change: Change) -> bool:
        """Whether the bad step's loss and gradient are, with one thing changed."""
        return self._replay.take(self._before, self._bad, change=change).is_finite

    def _step_goes_well(self, batch: Batch) -> bool:
        return self._replay.goes_well(self._before, self._bad, batch)

    def _try_step(
        self,
        name: ExperimentName,
        *,
        batch: Batch | None = None,
        change: Change = lambda one: one,
        prepare: Callable[[], None] | None = None,
        value: float = 0.0,
    ) -> bool:
        """Take the bad step once more with one thing changed; returns whether it went well."""
        is_healed = self._replay.goes_well(
            self._before,
            self._bad,
            self._bad.batch if batch is None else batch,
            change=change,
            prepare=prepare,
        )
        self._note(name, is_healed=is_healed, value=value)
        return is_healed

    def _note(self, name: ExperimentName, *, is_healed: bool, value: float = 0.0) -> None:
        failed_at = 0 if is_healed else self._bad.step
        self._experiments.append(
            Experiment(name=name, is_healed=is_healed, value=value, failed_at_step=failed_at)
        )

    def _healthy_batches(self) -> list[Batch]:
        earlier = [one for one in self._history.steps if one.step < self._bad.step]
        return [one.batch for one in earlier[-_NUM_HEALTHY:]]

    def _index_of(self, position: int) -> int:
        indices = self._bad.indices
        return int(indices[position]) if indices is not None and position < len(indices) else -1


_QUIET_PHASES: Mapping[Symptom, StepPhase] = {
    Symptom.NON_FINITE_INPUT: StepPhase.INPUT,
    Symptom.LABEL_OUT_OF_RANGE: StepPhase.INPUT,
    Symptom.DEAD_NETWORK: StepPhase.BACKWARD,
    Symptom.COLLAPSE: StepPhase.FORWARD,
}
"""Where to look if no number of the bad step is non-finite; otherwise it is the loss."""

"""The bad step of a case, the state before it, and experiments on it alone."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fedrounds.diagnosis.values import (
    Experiment,
    ExperimentName,
    Origin,
    StepPhase,
    SuspectSample,
    Symptom,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import Batch, take
from fedrounds.doctor.findings import Case
from fedrounds.doctor.guarded import GUARDS
from fedrounds.doctor.history import (
    Recorded,
    device_of,
    restore_snapshot,
)
from fedrounds.doctor.locate import locate, locate_error
from fedrounds.doctor.replay import Change, Replay, Trajectory, learned_from
from fedrounds.doctor.stepping import Again, descend, prepared, treated
from fedrounds.doctor.trials import Trials

_MODERATE = 1e9
"""What is computed from numbers below this has no excuse to overflow."""
_NUM_HEALTHY = 8
_NUM_DRAWS = 4
_SPIKE = 100.0
_SPOILT = 1.5
_WORTH = 0.3
"""A loss below this share of the first loss is nothing to worry about."""


class Evidence:
    """Everything known about a case: where it went wrong, and which experiments were made."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.symptom = case.symptom
        self.training = case.training
        self.history = case.history
        self.noticed = case.history.steps[-1]
        self.replay = Replay(
            case.training,
            case.history,
            level=case.level,
            needs_gradient=case.symptom is Symptom.DEAD_NETWORK,
            on_replay=case.on_replay,
            max_seconds=case.max_seconds,
            longest_s=case.longest_s,
        )
        self.experiments: list[Experiment] = []
        self.trials = Trials(self.replay, self.experiments)
        self.samples: tuple[SuspectSample, ...] = ()
        self.num_samples = 0
        self.max_input = math.inf
        self.trajectory: Trajectory | None = None
        self.bad = self.failed = self.noticed
        self.before = self.start = case.history.snapshots[-1]
        self.origin = Origin(phase=StepPhase.INPUT)
        self.largest_input = 0.0
        self.mixes_dtypes = False
        self.was_sane_before = False

    def find_onset(self) -> None:
        """Find the first step that harmed the model, and the last good state before it.

        `failed` stays the step where the bad value came up, unless no value was bad at all.
        """
        restore_snapshot(self.training, self.before)
        if self.replay.is_sane():
            self.was_sane_before = True
            return
        for snapshot in reversed(self.history.snapshots):
            self.start = snapshot
            restore_snapshot(self.training, snapshot)
            if self.replay.is_sane():
                break
        self.trajectory = self.replay.run(self.start, self.failed.step, is_watched=True)
        self.bad = self.recorded(self.trajectory.failed_at or self.failed.step)
        self.before = self.trajectory.before
        if not self.has_come_up():
            self.failed = self.bad

    def has_spoilt(self, trajectory: Trajectory) -> bool:
        """Whether a gradient far beyond the usual norm has undone a part of what was learned."""
        usual, norm = self.case.usual_norm, trajectory.steps[-1].outcome.grad_norm
        if usual is None or norm is None or not norm > _SPIKE * usual:
            return False
        after = self.replay.probe_loss()
        restore_snapshot(self.training, trajectory.before)
        allowed = max(_SPOILT * abs(self.replay.probe_loss()), _WORTH * abs(self.case.level))
        if not after > allowed:
            return False
        self.replay.allowed = allowed
        return True

    def recorded(self, step: int) -> Recorded:
        """Return the recorded step of this number."""
        return next(recorded for recorded in self.history.steps if recorded.step == step)

    def find_origin(self) -> None:
        """Find where the first bad value comes up in the bad step."""
        bad, training = self.bad, self.training
        batch = prepared(bad.batch, bad.treatment, training, step=bad.step)
        self.origin = Origin(phase=_QUIET_PHASES.get(self.symptom, StepPhase.LOSS))
        if batch is None:
            return

        def compute_loss(model: torch.nn.Module, any_batch: Batch) -> object:
            with treated(bad.treatment, model):
                return training.compute_loss(model, any_batch)

        restore_snapshot(training, self.before)
        bad.random_state.restore(device_of(training))
        self.replay.count_step()
        if bad.outcome.error is not None or self.symptom is Symptom.LABEL_OUT_OF_RANGE:
            raised = locate_error(training.model, batch, compute_loss)
            if raised is not None:
                self.origin = raised.origin
                self.mixes_dtypes = raised.mixes_dtypes
            return
        fault = locate(
            training.model,
            batch,
            compute_loss,
            optimizer_step=lambda: descend(
                training,
                bad.treatment,
                step=bad.step,
                again=Again(training, batch, bad.treatment),
            ),
        )
        if fault is not None:
            self.origin = fault.origin
            self.largest_input = fault.largest_input

    def has_come_up(self) -> bool:
        """Whether a number of the bad step isn't finite."""
        return self.origin.num_nan + self.origin.num_inf > 0

    def is_finite_case(self) -> bool:
        """Whether no number is bad: only what the training comes to is."""
        return self.noticed.outcome.is_finite and not self.has_come_up()

    def is_operation_guarded(self) -> bool:
        """Whether an operation with a guard made a bad value of moderate numbers, wherever."""
        operation = self.origin.operation.removesuffix("_").removesuffix("_backward")
        is_moderate = self.has_come_up() and self.largest_input <= _MODERATE
        return is_moderate and operation in GUARDS

    def is_loss_suspect(self) -> bool:
        """Whether the loss made a bad value of numbers that are no reason for it."""
        origin = self.origin
        is_in_loss = origin.phase is StepPhase.LOSS or (
            origin.phase is StepPhase.BACKWARD and not origin.module
        )
        return is_in_loss and self.has_come_up() and self.largest_input <= _MODERATE

    def guarded_step_goes_well(self) -> bool:
        """Whether the bad step goes well with its loss guarded."""
        return self.replay.goes_well(
            self.before, self.bad, self.bad.batch, change=interventions.guarding_loss()
        )

    def goes_well_with_other_draws(self) -> bool:
        """Whether the bad step goes well with each of some other states of the generators."""
        state = self.bad.random_state
        generator = torch.Generator()
        others = [generator.manual_seed(seed).get_state() for seed in range(_NUM_DRAWS)]
        return all(
            self.replay.goes_well(
                self.before,
                self.bad._replace(random_state=state._replace(cpu=other, cuda=None)),
                self.bad.batch,
            )
            for other in others
        )

    def fails_whatever_the_model(self, positions: Sequence[int], others: Sequence[int]) -> bool:
        """Whether these samples fail from usual initial weights in float64, and the others don't.

        The loss isn't defined for them then: neither the model's answers nor rounding are to blame.
        """
        fresh, training = self.case.fresh_state(), self.training

        def prepare() -> None:
            interventions.load_weights(training, fresh)
            interventions.double(training)

        def is_finite(part: Sequence[int]) -> bool:
            batch = interventions.doubled(take(self.bad.batch, part))
            return self.replay.take(self.before, self.bad, batch, prepare=prepare).is_finite

        return is_finite(others) and not is_finite(positions)

    def step_is_finite(self, change: Change) -> bool:
        """Whether the bad step's loss and gradient are, with one thing changed."""
        return self.replay.take(self.before, self.bad, change=change).is_finite

    def step_goes_well(self, batch: Batch) -> bool:
        """Whether the bad step goes well on this batch instead of its own."""
        return self.replay.goes_well(self.before, self.bad, batch)

    def try_step(
        self,
        name: ExperimentName,
        *,
        batch: Batch | None = None,
        change: Change = lambda treatment: treatment,
        prepare: Callable[[], None] | None = None,
        value: float = 0.0,
    ) -> bool:
        """Take the bad step once more with one thing changed; returns whether it went well."""
        is_healed = self.replay.goes_well(
            self.before,
            self.bad,
            self.bad.batch if batch is None else batch,
            change=change,
            prepare=prepare,
        )
        self.note(name, is_healed=is_healed, value=value)
        return is_healed

    def note(self, name: ExperimentName, *, is_healed: bool, value: float = 0.0) -> None:
        """Write down an experiment on the bad step."""
        failed_at = 0 if is_healed else self.bad.step
        self.experiments.append(
            Experiment(name=name, is_healed=is_healed, value=value, failed_at_step=failed_at)
        )

    def healthy_batches(self) -> list[Batch]:
        """Return the last batches before the bad step, the newest last."""
        earlier = [recorded for recorded in self.history.steps if recorded.step < self.bad.step]
        batches = (learned_from(self.training, recorded) for recorded in earlier[-_NUM_HEALTHY:])
        return [batch for batch in batches if batch is not None]

    def index_of(self, position: int) -> int:
        """Return the number in the data set of the sample at a position, -1 if unknown."""
        indices = self.bad.indices
        return int(indices[position]) if indices is not None and position < len(indices) else -1


_QUIET_PHASES: Mapping[Symptom, StepPhase] = {
    Symptom.NON_FINITE_INPUT: StepPhase.INPUT,
    Symptom.LABEL_OUT_OF_RANGE: StepPhase.INPUT,
    Symptom.DEAD_NETWORK: StepPhase.BACKWARD,
    Symptom.COLLAPSE: StepPhase.FORWARD,
}
"""Where to look if no number of the bad step is non-finite; otherwise it is the loss."""

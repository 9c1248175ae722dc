"""The doctor: takes the steps of a training, notices what goes wrong, and cures it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    DoctorSettings,
    Remedy,
    RemedyKind,
    RemedyPolicy,
    Symptom,
    TrendPoint,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.anomalies import usual_state
from fedrounds.doctor.batches import Batch, batch_size, tensors_of
from fedrounds.doctor.examination import examine
from fedrounds.doctor.findings import Case, Finding
from fedrounds.doctor.history import (
    RandomState,
    Recorded,
    StepHistory,
    device_of,
    infinite_buffers,
    is_finite,
    restore_snapshot,
    symptom_of_state,
    take_snapshot,
)
from fedrounds.doctor.monitor import Monitor, classes_of
from fedrounds.doctor.nan_guard import NanGuard, trend_point
from fedrounds.doctor.remedies import Allowance, applied, remedies_for
from fedrounds.doctor.reports import StepReport, TrainingHalted
from fedrounds.doctor.stepping import (
    UNTREATED,
    ComputeLoss,
    Overrides,
    StepOutcome,
    TrainingState,
    take_step,
)

_NUM_TREND = 5
_SUSPICIONS = (Symptom.LOSS_EXPLOSION, Symptom.DEAD_NETWORK, Symptom.COLLAPSE)


class Doctor:
    """Owns the history of one training, and the model and optimizer while a step is taken.

    `doctor.step(batch)` stands in place of forward, backward and the optimizer's step;
    `doctor.finish()` after the last one makes sure that all is well.

    Args:
        model: on its device, in training mode.
        optimizer: over the model's parameters.
        compute_loss: (model, batch) to the loss, or to (loss, outputs [n, classes, ...]); it may
            be called again and again and depends on nothing but its arguments and torch's
            generators.
        scheduler: stepped after every optimizer step.
        settings: what may be done.
        clip_norm: the training's own largest global L2 norm of a gradient.
        num_classes: labels, the last integer tensor of a batch, go from 0 to below it; where not
            given, taken from the first outputs that fit the labels.
        is_initial: whether the weights are freshly initialised rather than received or trained.
        fresh_state: gives usual initial weights by name; by default the modules'
            `reset_parameters` do.
        treatment: what is in force from the beginning, from a cure before.
        on_replay: told of each step that is taken again.
        on_diagnosis: told of each diagnosis the moment it is there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        compute_loss: ComputeLoss,
        *,
        scheduler: LRScheduler | None = None,
        settings: DoctorSettings | None = None,
        clip_norm: float | None = None,
        num_classes: int | None = None,
        is_initial: bool = True,
        fresh_state: Callable[[], Mapping[str, Tensor]] | None = None,
        treatment: Overrides = UNTREATED,
        on_replay: Callable[[], None] = lambda: None,
        on_diagnosis: Callable[[Diagnosis], None] = lambda _: None,
    ) -> None:
        self.settings = settings or DoctorSettings()
        self.treatment = treatment
        self.diagnoses: list[Diagnosis] = []
        self._training = TrainingState(
            model=model,
            optimizer=optimizer,
            compute_loss=compute_loss,
            scheduler=scheduler,
            clip_norm=clip_norm,
            num_classes=num_classes,
            learning=[one for one in model.parameters() if one.requires_grad],
            infinite=infinite_buffers(model),
        )
        self._is_initial = is_initial
        self._fresh_state = fresh_state or (lambda: usual_state(model))
        self._on_replay = on_replay
        self._on_diagnosis = on_diagnosis
        self._device = device_of(self._training)
        self._can_fail = self._device.type == "cpu"
        self._monitor = Monitor(num_classes=num_classes)
        self._history = StepHistory(memory_bytes=self.settings.memory_bytes)
        self._step = 0
        self._epoch = self._batch = 0
        self._allowance = Allowance(self.settings.max_remedies)
        self._dismissed: set[Symptom] = set()
        if treatment.widens:
            interventions.widen(self._training)
        self._nan_guard = None if self.settings.is_armed else NanGuard(self._training)
        if self._nan_guard is None:
            self._history.keep(take_snapshot(self._training, step=0))

    def step(
        self, batch: Batch, *, indices: Sequence[int] | Tensor | None = None, epoch: int = 1
    ) -> StepReport:
        """Take one training step on a batch.

        Args:
            batch: a tensor, or a tuple, list or dict of tensors, with the samples in dimension 0.
            indices: the samples' numbers in the data set, if known.
            epoch: from 1; for reports.

        Returns:
            How it went; after a cure, how it went then.

        Raises:
            TrainingHalted: it went wrong, and may not or can't be cured.
        """
        self._step += 1
        self._batch = self._batch + 1 if epoch == self._epoch else 1
        self._epoch = epoch
        if self._nan_guard is not None:
            return self._take_unwatched(batch, self._nan_guard)
        # A label out of range ends a CUDA process for good.
        symptom = None if self._can_fail else self._examine_ahead(batch)
        random_state = RandomState.now(self._device)
        outcome = StepOutcome(lr=self._lr()) if symptom is not None else self._take(batch)
        self._history.record(
            Recorded(
                step=self._step,
                epoch=epoch,
                batch_number=self._batch,
                batch=batch,
                indices=indices.tolist() if isinstance(indices, Tensor) else indices,
                random_state=random_state,
                treatment=self.treatment,
                outcome=outcome.without_tensors(),
                num_bytes=sum(one.nbytes for one in tensors_of(batch)),
            )
        )
        is_tried = symptom is None
        if is_tried:
            symptom = self._examine(outcome, batch)
        if self._step == 1 and self._training.num_classes is None:
            self._learn_classes(outcome)
        if symptom is None and self._history.is_snapshot_due(self._step):
            symptom = self._keep_state()
        if symptom is not None and symptom not in self._dismissed:
            outcome = self._treat(symptom, outcome, is_tried=is_tried)
        return self._report(outcome)

    def finish(self) -> None:
        """Make sure that the last steps left the model well; call it after the last one.

        Raises:
            TrainingHalted: they didn't, and it may not or can't be cured.
        """
        if self._nan_guard is not None:
            self._stop_at(self._nan_guard.examine_state())
        elif self._step and not is_finite(self._training):
            symptom, _ = symptom_of_state(self._training)
            self._treat(symptom, self._history.steps[-1].outcome)

    # ---- taking a step

    def _take(self, batch: Batch) -> StepOutcome:
        return take_step(
            self._training,
            batch,
            self.treatment,
            step=self._step,
            is_measured=self._monitor.needs_measure(self._step),
        )

    def _take_unwatched(self, batch: Batch, nan_guard: NanGuard) -> StepReport:
        """Take a step and stop where it is not finite."""
        outcome = take_step(self._training, batch, self.treatment, step=self._step)
        if outcome.error is not None:
            raise outcome.error
        self._stop_at(
            nan_guard.examine(outcome, step=self._step, epoch=self._epoch, batch=self._batch)
        )
        return self._report(outcome)

    def _stop_at(self, diagnosis: Diagnosis | None) -> None:
        if diagnosis is not None:
            self._tell(diagnosis)
            raise TrainingHalted(diagnosis)

    # ---- noticing

    def _examine_ahead(self, batch: Batch) -> Symptom | None:
        """Look at a batch before the step, where that can't be taken back."""
        symptom = self._monitor.examine_labels(batch)
        return None if symptom in self._dismissed or self._is_treated() else symptom

    def _examine(self, outcome: StepOutcome, batch: Batch) -> Symptom | None:
        """Look at a step that was taken."""
        symptom = self._monitor.examine_step(outcome, step=self._step)
        if symptom is None or outcome.is_finite or self._is_treated():
            return symptom
        return self._monitor.examine_batch(batch) or symptom

    def _learn_classes(self, outcome: StepOutcome) -> None:
        """Take from the first outputs how many classes there are."""
        num_classes = classes_of(outcome.outputs, outcome.labels)
        self._training = replace(self._training, num_classes=num_classes)
        self._monitor.num_classes = num_classes

    def _keep_state(self) -> Symptom | None:
        """Keep the state if it is good."""
        if not is_finite(self._training):
            return symptom_of_state(self._training)[0]
        symptom = self._monitor.examine_answers()
        if symptom is None or symptom in self._dismissed:
            spare = self._history.make_room(self._step)
            self._history.keep(take_snapshot(self._training, step=self._step, spare=spare))
        return symptom

    def _is_treated(self) -> bool:
        """Whether the treatment in force takes care of what a batch shows."""
        return bool(self.treatment.drops) or self.treatment.sanitises

    # ---- treating

    def _treat(
        self, symptom: Symptom, outcome: StepOutcome, *, is_tried: bool = True
    ) -> StepOutcome:
        """Find out why, and go on if that can be; returns how the newest step went then."""
        began = time.monotonic()
        live = take_snapshot(self._training, step=self._step)
        random_state = RandomState.now(self._device)
        steps = list(self._history.steps)
        finding = examine(
            Case(
                training=self._training,
                history=self._history,
                symptom=symptom,
                is_tried=is_tried,
                level=self._monitor.first_level,
                usual_norm=self._monitor.usual_norm,
                is_initial=self._is_initial,
                fresh_state=self._fresh_state,
                on_replay=self._on_replay,
            )
        )
        if finding is None:
            restore_snapshot(self._training, live)
            random_state.restore(self._device)
            return self._dismiss(symptom, outcome)
        if outcome.error is not None and finding.cause is Cause.UNKNOWN:
            # Nothing says that it isn't a mistake in the model's code: its author is to see it.
            raise outcome.error
        diagnosis = self._diagnosis(finding)
        policy = self.settings.policy_for(finding.cause)
        candidates: list[Remedy] = []
        if policy is RemedyPolicy.CURE:
            candidates = list(remedies_for(finding))
        elif policy is RemedyPolicy.SKIP:
            candidates = [Remedy(kind=RemedyKind.SKIP_BATCH)]
        for remedy in candidates:
            num_skipped = len(self.treatment.skips)
            if not self._allowance.grants(remedy, finding, num_skipped=num_skipped):
                break
            again = self._apply(remedy, finding, steps)
            if again is not None:
                self._allowance.remember(remedy, finding)
                random_state.restore(self._device)
                cured = replace(remedy, is_working=True)
                self._tell(replace(diagnosis, remedy=cured, seconds=time.monotonic() - began))
                return again
        tried = candidates[-1] if candidates else diagnosis.remedy
        self._tell(replace(diagnosis, remedy=tried, seconds=time.monotonic() - began))
        raise TrainingHalted(self.diagnoses[-1]) from outcome.error

    def _dismiss(self, symptom: Symptom, outcome: StepOutcome) -> StepOutcome:
        """Go on as if nothing had been noticed; the same suspicion isn't followed for ever."""
        assert is_finite(self._training), symptom
        if symptom not in (Symptom.LOSS_EXPLOSION,):
            self._dismissed.add(symptom)
        if not outcome.is_taken or math.isnan(outcome.loss):
            newest = self._history.steps.pop()
            outcome = self._take(newest.batch)
            self._history.steps.append(newest._replace(outcome=outcome.without_tensors()))
        if self._history.is_snapshot_due(self._step) and is_finite(self._training):
            self._history.keep(take_snapshot(self._training, step=self._step))
        return outcome

    def _apply(
        self, remedy: Remedy, finding: Finding, recorded: Sequence[Recorded]
    ) -> StepOutcome | None:
        """Go back and take the steps since again under a remedy; None if that fails."""
        treatment = applied(self.treatment, remedy, finding)
        start = finding.return_to
        steps = [one for one in recorded if one.step > start.step]
        restore_snapshot(self._training, start)
        if remedy.kind is RemedyKind.USE_FLOAT32:
            interventions.widen(self._training)
        if remedy.kind is RemedyKind.RESET_OPTIMIZER:
            interventions.forget_history(self._training)
        self._monitor.rewind(start.step)
        self._history.rewind(start.step)
        self._history.keep(take_snapshot(self._training, step=start.step))
        outcome = StepOutcome(is_taken=False)
        for one in steps:
            one.random_state.restore(self._device)
            outcome = take_step(self._training, one.batch, treatment, step=one.step)
            self._on_replay()
            self._history.record(
                one._replace(treatment=treatment, outcome=outcome.without_tensors()),
            )
            symptom = self._monitor.examine_step(outcome, step=one.step)
            is_certain = symptom is not None and symptom not in _SUSPICIONS
            if is_certain or (symptom is not None and remedy.kind is RemedyKind.REPEAT):
                return None
        if not is_finite(self._training):
            return None
        self.treatment = treatment
        return outcome

    # ---- telling

    def _diagnosis(self, finding: Finding) -> Diagnosis:
        bad = finding.bad_step
        return Diagnosis(
            symptom=finding.symptom,
            cause=finding.cause,
            step=bad.step,
            noticed_at_step=self._step,
            epoch=bad.epoch,
            batch=bad.batch_number,
            batch_size=batch_size(bad.batch),
            lr=bad.outcome.lr,
            origin=finding.origin,
            samples=finding.samples,
            num_samples=finding.num_samples,
            experiments=finding.experiments,
            contributing=finding.contributing,
            trend=finding.trend or self._trend(),
            returned_to_step=finding.return_to.step,
            num_replayed_steps=finding.num_replayed_steps,
        )

    def _trend(self) -> tuple[TrendPoint, ...]:
        newest = list(self._history.steps)[-_NUM_TREND:]
        return tuple(trend_point(one.step, one.outcome) for one in newest)

    def _tell(self, diagnosis: Diagnosis) -> None:
        self.diagnoses.append(diagnosis)
        self._on_diagnosis(diagnosis)

    def _lr(self) -> float:
        rate = float(self._training.optimizer.param_groups[0]["lr"])
        return self.treatment.rate(rate, step=self._step)

    def _report(self, outcome: StepOutcome) -> StepReport:
        return StepReport(
            step=self._step,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=outcome.lr,
            outputs=outcome.outputs,
            targets=outcome.targets,
            batch_size=outcome.batch_size if outcome.is_taken else 0,
        )

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
    Tape,
    device_of,
    infinite_buffers,
    is_finite,
    restore_snapshot,
    symptom_of_state,
    take_snapshot,
)
from fedrounds.doctor.monitor import Watch, classes_of
from fedrounds.doctor.nan_guard import Disarmed, trend_point
from fedrounds.doctor.remedies import Allowance, applied, remedies_for
from fedrounds.doctor.reports import StepReport, TrainingHalted
from fedrounds.doctor.stepping import (
    UNTREATED,
    ComputeLoss,
    Subject,
    Taken,
    Treatment,
    take_step,
)

_NUM_TREND = 5
_SUSPICIONS = (Symptom.LOSS_EXPLOSION, Symptom.DEAD_NETWORK, Symptom.COLLAPSE)


class Doctor:
    """Owns the tape of one training, and the model and optimizer while a step is taken.

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
        treatment: Treatment = UNTREATED,
        on_replay: Callable[[], None] = lambda: None,
        on_diagnosis: Callable[[Diagnosis], None] = lambda _: None,
    ) -> None:
        self.settings = settings or DoctorSettings()
        self.treatment = treatment
        self.diagnoses: list[Diagnosis] = []
        self._subject = Subject(
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
        self._device = device_of(self._subject)
        self._can_fail = self._device.type == "cpu"
        self._watch = Watch(num_classes=num_classes)
        self._tape = Tape(memory_bytes=self.settings.memory_bytes)
        self._step = 0
        self._epoch = self._batch = 0
        self._allowance = Allowance(self.settings.max_remedies)
        self._dismissed: set[Symptom] = set()
        if treatment.widens:
            interventions.widen(self._subject)
        self._disarmed = None if self.settings.is_armed else Disarmed(self._subject)
        if self._disarmed is None:
            self._tape.keep(take_snapshot(self._subject, step=0))

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
        if self._disarmed is not None:
            return self._take_unwatched(batch, self._disarmed)
        # A label out of range ends a CUDA process for good.
        symptom = None if self._can_fail else self._examine_ahead(batch)
        random_state = RandomState.now(self._device)
        taken = Taken(lr=self._lr()) if symptom is not None else self._take(batch)
        self._tape.record(
            Recorded(
                step=self._step,
                epoch=epoch,
                batch_number=self._batch,
                batch=batch,
                indices=indices.tolist() if isinstance(indices, Tensor) else indices,
                random_state=random_state,
                treatment=self.treatment,
                taken=taken.without_tensors(),
                num_bytes=sum(one.nbytes for one in tensors_of(batch)),
            )
        )
        is_tried = symptom is None
        if is_tried:
            symptom = self._examine(taken, batch)
        if self._step == 1 and self._subject.num_classes is None:
            self._learn_classes(taken)
        if symptom is None and self._tape.is_snapshot_due(self._step):
            symptom = self._keep_state()
        if symptom is not None and symptom not in self._dismissed:
            taken = self._treat(symptom, taken, is_tried=is_tried)
        return self._report(taken)

    def finish(self) -> None:
        """Make sure that the last steps left the model well; call it after the last one.

        Raises:
            TrainingHalted: they didn't, and it may not or can't be cured.
        """
        if self._disarmed is not None:
            self._stop_at(self._disarmed.examine_state())
        elif self._step and not is_finite(self._subject):
            symptom, _ = symptom_of_state(self._subject)
            self._treat(symptom, self._tape.steps[-1].taken)

    # ---- taking a step

    def _take(self, batch: Batch) -> Taken:
        return take_step(
            self._subject,
            batch,
            self.treatment,
            step=self._step,
            is_measured=self._watch.needs_measure(self._step),
        )

    def _take_unwatched(self, batch: Batch, disarmed: Disarmed) -> StepReport:
        """Take a step and stop where it is not finite."""
        taken = take_step(self._subject, batch, self.treatment, step=self._step)
        if taken.error is not None:
            raise taken.error
        self._stop_at(
            disarmed.examine(taken, step=self._step, epoch=self._epoch, batch=self._batch)
        )
        return self._report(taken)

    def _stop_at(self, diagnosis: Diagnosis | None) -> None:
        if diagnosis is not None:
            self._tell(diagnosis)
            raise TrainingHalted(diagnosis)

    # ---- noticing

    def _examine_ahead(self, batch: Batch) -> Symptom | None:
        """Look at a batch before the step, where that can't be taken back."""
        symptom = self._watch.examine_labels(batch)
        return None if symptom in self._dismissed or self._is_treated() else symptom

    def _examine(self, taken: Taken, batch: Batch) -> Symptom | None:
        """Look at a step that was taken."""
        symptom = self._watch.examine_step(taken, step=self._step)
        if symptom is None or taken.is_finite or self._is_treated():
            return symptom
        return self._watch.examine_batch(batch) or symptom

    def _learn_classes(self, taken: Taken) -> None:
        """Take from the first outputs how many classes there are."""
        num_classes = classes_of(taken.outputs, taken.labels)
        self._subject = replace(self._subject, num_classes=num_classes)
        self._watch.num_classes = num_classes

    def _keep_state(self) -> Symptom | None:
        """Keep the state if it is good."""
        if not is_finite(self._subject):
            return symptom_of_state(self._subject)[0]
        symptom = self._watch.examine_answers()
        if symptom is None or symptom in self._dismissed:
            spare = self._tape.make_room(self._step)
            self._tape.keep(take_snapshot(self._subject, step=self._step, spare=spare))
        return symptom

    def _is_treated(self) -> bool:
        """Whether the treatment in force takes care of what a batch shows."""
        return bool(self.treatment.drops) or self.treatment.sanitises

    # ---- treating

    def _treat(self, symptom: Symptom, taken: Taken, *, is_tried: bool = True) -> Taken:
        """Find out why, and go on if that can be; returns how the newest step went then."""
        began = time.monotonic()
        live = take_snapshot(self._subject, step=self._step)
        random_state = RandomState.now(self._device)
        steps = list(self._tape.steps)
        finding = examine(
            Case(
                subject=self._subject,
                tape=self._tape,
                symptom=symptom,
                is_tried=is_tried,
                level=self._watch.first_level,
                usual_norm=self._watch.usual_norm,
                is_initial=self._is_initial,
                fresh_state=self._fresh_state,
                on_replay=self._on_replay,
            )
        )
        if finding is None:
            restore_snapshot(self._subject, live)
            random_state.restore(self._device)
            return self._dismiss(symptom, taken)
        if taken.error is not None and finding.cause is Cause.UNKNOWN:
            # Nothing says that it isn't a mistake in the model's code: its author is to see it.
            raise taken.error
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
        raise TrainingHalted(self.diagnoses[-1]) from taken.error

    def _dismiss(self, symptom: Symptom, taken: Taken) -> Taken:
        """Go on as if nothing had been noticed; the same suspicion isn't followed for ever."""
        assert is_finite(self._subject), symptom
        if symptom not in (Symptom.LOSS_EXPLOSION,):
            self._dismissed.add(symptom)
        if not taken.is_taken or math.isnan(taken.loss):
            newest = self._tape.steps.pop()
            taken = self._take(newest.batch)
            self._tape.steps.append(newest._replace(taken=taken.without_tensors()))
        if self._tape.is_snapshot_due(self._step) and is_finite(self._subject):
            self._tape.keep(take_snapshot(self._subject, step=self._step))
        return taken

    def _apply(
        self, remedy: Remedy, finding: Finding, recorded: Sequence[Recorded]
    ) -> Taken | None:
        """Go back and take the steps since again under a remedy; None if that fails."""
        treatment = applied(self.treatment, remedy, finding)
        start = finding.return_to
        steps = [one for one in recorded if one.step > start.step]
        restore_snapshot(self._subject, start)
        if remedy.kind is RemedyKind.USE_FLOAT32:
            interventions.widen(self._subject)
        if remedy.kind is RemedyKind.RESET_OPTIMIZER:
            interventions.forget_history(self._subject)
        self._watch.rewind(start.step)
        self._tape.rewind(start.step)
        self._tape.keep(take_snapshot(self._subject, step=start.step))
        taken = Taken(is_taken=False)
        for one in steps:
            one.random_state.restore(self._device)
            taken = take_step(self._subject, one.batch, treatment, step=one.step)
            self._on_replay()
            self._tape.record(
                one._replace(treatment=treatment, taken=taken.without_tensors()),
            )
            symptom = self._watch.examine_step(taken, step=one.step)
            is_certain = symptom is not None and symptom not in _SUSPICIONS
            if is_certain or (symptom is not None and remedy.kind is RemedyKind.REPEAT):
                return None
        if not is_finite(self._subject):
            return None
        self.treatment = treatment
        return taken

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
            lr=bad.taken.lr,
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
        newest = list(self._tape.steps)[-_NUM_TREND:]
        return tuple(trend_point(one.step, one.taken) for one in newest)

    def _tell(self, diagnosis: Diagnosis) -> None:
        self.diagnoses.append(diagnosis)
        self._on_diagnosis(diagnosis)

    def _lr(self) -> float:
        rate = float(self._subject.optimizer.param_groups[0]["lr"])
        return self.treatment.rate(rate, step=self._step)

    def _report(self, taken: Taken) -> StepReport:
        return StepReport(
            step=self._step,
            loss=taken.loss,
            grad_norm=taken.grad_norm,
            lr=taken.lr,
            outputs=taken.outputs,
            targets=taken.targets,
            batch_size=taken.batch_size if taken.is_taken else 0,
        )

"""The doctor: takes the steps of a training, notices what goes wrong, and cures it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedrounds.diagnosis.values import (
    Diagnosis,
    DoctorSettings,
    Symptom,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.anomalies import usual_state
from fedrounds.doctor.batches import Batch, are_out_of_range, labels_of, tensors_of
from fedrounds.doctor.callbacks import CallerError, passing
from fedrounds.doctor.floor import Floor
from fedrounds.doctor.history import (
    RandomState,
    Recorded,
    StepHistory,
    device_of,
    is_finite,
    non_finite_buffers,
    settings_of,
    symptom_of_state,
    take_snapshot,
)
from fedrounds.doctor.labels import ignored_labels
from fedrounds.doctor.lost_updates import FIRST_LOOK, look_for_lost_updates
from fedrounds.doctor.monitor import Monitor, classes_of
from fedrounds.doctor.nan_guard import NanGuard
from fedrounds.doctor.outside import OutsideWrites
from fedrounds.doctor.plain import Progress, go_on, last_word, plain_step
from fedrounds.doctor.replay import learned_from
from fedrounds.doctor.reports import StepReport, TrainingHalted
from fedrounds.doctor.requirements import needs_closure, require_supported
from fedrounds.doctor.session import Session
from fedrounds.doctor.stepping import (
    UNTREATED,
    Attempt,
    Averaged,
    ComputeLoss,
    Overrides,
    StepOutcome,
    TrainingState,
    take_step,
)
from fedrounds.doctor.suspicion import SUSPICIONS
from fedrounds.doctor.treating import StepError, Treatments
from fedrounds.errors import InvalidInput

logger = logging.getLogger(__name__)

_NUM_COPED = 9
"""So many steps back it is seen whether inputs that aren't finite went well."""


class Doctor:
    """Owns the history of one training, and the model and optimizer while a step is taken.

    `doctor.step(batch)` stands in place of forward, backward and the optimizer's step;
    `doctor.finish()` after the last step makes sure that all is well.

    Args:
        model: on its device, in training mode.
        optimizer: over the model's parameters.
        compute_loss: (model, batch) to the loss, to (loss, outputs [n, classes, ...]), or to a
            dictionary or an object with `loss` and `logits`; it may be called again and again and
            depends on nothing but its arguments and torch's generators.
        scheduler: stepped after every optimizer step. If it needs a metric, step it yourself.
        settings: what may be done.
        clip_norm: the training's own largest global L2 norm of a gradient.
        scaler: of the loss, for float16; steps that it leaves out are no fault.
        averaged: a moving average of the weights, updated after every optimizer step.
        num_classes: labels, the last integer tensor of a batch, go from 0 to below it; where not
            given, taken from the first outputs that fit the labels.
        is_initial: whether the weights are freshly initialised rather than received or trained.
        fresh_state: gives usual initial weights by name; by default the modules'
            `reset_parameters` do.
        treatment: what is in force from the beginning, from a cure before.
        on_replay: called for each step that is taken again.
        on_diagnosis: called with each diagnosis as soon as it is made.

    Raises:
        InvalidInput: the training is of a form that a step can't be repeated in.
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
        scaler: GradScaler | None = None,
        averaged: Averaged | None = None,
        num_classes: int | None = None,
        is_initial: bool = True,
        fresh_state: Callable[[], Mapping[str, Tensor]] | None = None,
        treatment: Overrides = UNTREATED,
        on_replay: Callable[[], None] = lambda: None,
        on_diagnosis: Callable[[Diagnosis], None] = lambda _: None,
    ) -> None:
        self.settings = settings or DoctorSettings()
        training = TrainingState(
            model=model,
            optimizer=optimizer,
            compute_loss=compute_loss,
            scheduler=scheduler,
            clip_norm=clip_norm,
            scaler=scaler,
            averaged=averaged,
            num_classes=num_classes,
            needs_closure=needs_closure(optimizer),
            learning=[parameter for parameter in model.parameters() if parameter.requires_grad],
        )
        require_supported(training)
        self._session = Session(
            training=training,
            history=StepHistory(memory_bytes=self.settings.memory_bytes),
            monitor=Monitor(num_classes=num_classes),
            device=torch.device("cpu"),
            treatment=treatment,
            on_replay=passing(on_replay),
            on_diagnosis=passing(on_diagnosis),
        )
        self._treatments = Treatments(
            self._session,
            self.settings,
            is_initial=is_initial,
            fresh_state=fresh_state or (lambda: usual_state(model)),
        )
        self._epoch = self._batch = 0
        self._is_plain = False
        self._nan_guard: NanGuard | None = None
        self._parameters = list(model.parameters())
        self._structure: tuple[int, ...] = ()
        self._can_fail = True
        self._has_looked_at_updates = False
        self._outside_writes = OutsideWrites()
        try:
            self._begin()
        except Exception as error:
            self._give_up(error)

    def _begin(self) -> None:
        """Look at the training as it is before the first step."""
        session = self._session
        session.device = device_of(session.training)
        self._can_fail = session.device.type == "cpu"
        non_finite = non_finite_buffers(session.training.model)
        session.training = replace(session.training, non_finite=non_finite)
        if session.treatment.widens:
            interventions.widen(session.training)
        self._structure = self._structure_now()
        if self.settings.is_armed:
            session.history.keep(take_snapshot(session.training, step=0))
            self._outside_writes.note(session.training)
        else:
            self._nan_guard = NanGuard(session.training)

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """What went wrong so far."""
        return self._session.diagnoses

    @property
    def treatment(self) -> Overrides:
        """What is in force."""
        return self._session.treatment

    def step(
        self,
        batch: Batch,
        *,
        indices: Sequence[int] | Tensor | None = None,
        epoch: int = 1,
        updates: bool = True,
    ) -> StepReport:
        """Take one training step on a batch.

        Args:
            batch: of any structure, with the samples in dimension 0 of its tensors.
            indices: the samples' numbers in the data set, if known.
            epoch: from 1; for reports.
            updates: whether the optimizer steps. If not, this batch's gradients are added to those
                of the batches after it (gradient accumulation).

        Returns:
            How it went; after a cure, how it went then.

        Raises:
            TrainingHalted: it went wrong, and may not or can't be cured.
            Exception: what the model, the loss or a callback raised.
        """
        self._session.step += 1
        self._session.num_updates += updates
        if not updates and self._session.training.needs_closure:
            raise InvalidInput(
                "an optimizer that computes the loss itself (L-BFGS) can't wait for more batches"
            )
        self._batch = self._batch + 1 if epoch == self._epoch else 1
        self._epoch = epoch
        if self._is_plain:
            return plain_step(
                self._session.training, batch, step=self._session.step, updates=updates
            )
        if self._nan_guard is not None:
            return self._take_unwatched(batch, self._nan_guard, updates=updates)
        progress = Progress()
        try:
            numbers = indices.tolist() if isinstance(indices, Tensor) else indices
            if self._treatments.floor is not None:
                return self._take_unhealed(
                    batch, numbers, self._treatments.floor, progress, updates=updates
                )
            report = self._take_watched(batch, numbers, progress, updates=updates)
            self._outside_writes.note(self._session.training)
            return report
        except TrainingHalted:
            raise
        except CallerError as error:
            raise error.error from None
        except Exception as error:
            if isinstance(error, InvalidInput) and self._session.step == 1:
                raise
            failure = error
        # Outside of the handler: the step's own error is no consequence of the doctor's.
        return self._go_on(failure, batch, progress, updates=updates)

    def finish(self) -> None:
        """Make sure that the last steps left the model well; call it after the last step.

        Raises:
            TrainingHalted: they didn't, and it may not or can't be cured.
        """
        if self._nan_guard is not None:
            self._stop_at(self._last_look(self._nan_guard))
            return
        if not self._is_plain and self._treatments.floor is not None:
            self._treatments.floor.keep(step=self._session.step)
        elif not self._is_plain and self._session.step:
            progress = Progress()
            try:
                self._finish(progress)
            except TrainingHalted:
                raise
            except CallerError as error:
                raise error.error from None
            except Exception as error:
                if progress.live is not None:
                    progress.live.put_back()
                self._give_up(error)
        if self._is_plain:
            self._stop_at(last_word(self._session.training, step=self._session.step))

    def _finish(self, progress: Progress) -> None:
        """Treat what the last steps left."""
        steps, training = self._session.history.steps, self._session.training
        if steps and not is_finite(training):
            symptom, _ = symptom_of_state(training)
            self._treatments.treat(symptom, steps[-1].outcome, progress)
        elif steps and self._treatments.suspicion is not None:
            self._treatments.look_into(steps[-1].outcome, progress)
        elif steps:
            self._treatments.judge_last_steps(steps[-1].outcome, progress)

    # ---- taking a step

    def _take_watched(
        self,
        given: Batch,
        indices: Sequence[int] | None,
        progress: Progress,
        *,
        updates: bool,
    ) -> StepReport:
        """Take a step, look at it, and treat what is wrong."""
        if self._structure != self._structure_now():
            require_supported(self._session.training)
            self._begin_anew(after=self._session.step - 1)
        batch, indices, is_empty = self._treatments.left_out.without(given, indices)
        if is_empty:
            skipping = interventions.skipping(self._session.step)
            self._session.treatment = skipping(self._session.treatment)
        # A label out of range ends a CUDA process for good.
        symptom = None if self._can_fail else self._examine_ahead(batch)
        progress.random_state = RandomState.now(self._session.device)
        settings = settings_of(self._session.training.optimizer)
        written = self._outside_writes.since_noted(self._session.training)
        progress.attempt = Attempt()
        is_tried = symptom is None
        outcome = (
            self._session.take(batch, progress.attempt, updates=updates)
            if is_tried
            else StepOutcome(lr=self._lr())
        )
        self._session.history.record(
            Recorded(
                step=self._session.step,
                epoch=self._epoch,
                batch_number=self._batch,
                batch=batch,
                indices=indices,
                random_state=progress.random_state,
                settings=settings,
                treatment=self._session.treatment,
                outcome=outcome.without_tensors(),
                num_bytes=sum(tensor.nbytes for tensor in tensors_of(batch)),
                updates=updates,
                written=written,
            )
        )
        if is_tried:
            symptom = self._examine(outcome, batch)
        if self._session.step == 1 and self._session.training.num_classes is None:
            self._learn_classes(outcome)
        if (
            symptom is None
            and updates
            and self._session.history.is_snapshot_due(self._session.step)
        ):
            symptom = self._keep_state()
        outcome = self._act_on(symptom, outcome, progress, is_tried=is_tried)
        report = self._report(outcome)
        self._treatments.count(given, outcome)
        return report

    def _take_unhealed(
        self,
        given: Batch,
        indices: Sequence[int] | None,
        floor: Floor,
        progress: Progress,
        *,
        updates: bool,
    ) -> StepReport:
        """Take a step of a training that is treated no further.

        Raises:
            TrainingHalted: the step raised an error, as it would in a plain loop.
        """
        batch, _, is_empty = self._treatments.left_out.without(given, indices)
        is_label_wrong = not self._can_fail and self._examine_ahead(batch) is not None
        if is_empty or is_label_wrong:
            return self._report(StepOutcome(lr=self._lr(), is_taken=False))
        progress.random_state = RandomState.now(self._session.device)
        progress.attempt = Attempt()
        outcome = floor.take(
            batch, step=self._session.step, updates=updates, attempt=progress.attempt
        )
        if outcome.error is not None:
            raise TrainingHalted(self._session.diagnoses[-1]) from outcome.error
        return self._report(outcome)

    def _act_on(
        self,
        symptom: Symptom | None,
        outcome: StepOutcome,
        progress: Progress,
        *,
        is_tried: bool,
    ) -> StepOutcome:
        """Do what a symptom asks for, or what is due without a symptom."""
        if symptom is not None and self._treatments.release.is_on_trial:
            return self._treatments.take_back(symptom, outcome, progress, is_tried=is_tried)
        treatments, session, step = self._treatments, self._session, self._session.step
        if symptom in SUSPICIONS:
            treatments.suspect(symptom, outcome)
        elif symptom is not None and not treatments.is_dismissed(symptom):
            return treatments.treat(symptom, outcome, progress, is_tried=is_tried)
        if treatments.suspicion is not None and treatments.suspicion.is_ripe(step):
            return treatments.look_into(outcome, progress)
        if step > FIRST_LOOK and not self._has_looked_at_updates and not session.diagnoses:
            self._has_looked_at_updates = True
            diagnosis = look_for_lost_updates(session, progress)
            if diagnosis is not None:
                session.tell(diagnosis)
        return treatments.ease(outcome, progress) if treatments.release.is_due(step) else outcome

    def _take_unwatched(self, batch: Batch, nan_guard: NanGuard, *, updates: bool) -> StepReport:
        """Take a step and stop where it is not finite."""
        step = self._session.step
        outcome = take_step(
            self._session.training,
            batch,
            self._session.treatment,
            step=step,
            updates=updates,
            is_measured=updates,
        )
        if outcome.error is not None:
            raise outcome.error
        try:
            diagnosis = nan_guard.examine(outcome, step=step, epoch=self._epoch, batch=self._batch)
        except Exception as error:
            self._nan_guard = None
            self._give_up(error)
        else:
            self._stop_at(diagnosis)
        return self._report(outcome)

    def _last_look(self, nan_guard: NanGuard) -> Diagnosis | None:
        """Return the diagnosis of a last state that isn't finite; None also where this fails."""
        try:
            return nan_guard.examine_state()
        except Exception as error:
            self._give_up(error)
            return None

    def _stop_at(self, diagnosis: Diagnosis | None) -> None:
        if diagnosis is not None:
            self._session.tell(diagnosis)
            raise TrainingHalted(diagnosis)

    # ---- where the doctor itself fails

    def _go_on(
        self, error: Exception, batch: Batch, progress: Progress, *, updates: bool
    ) -> StepReport:
        """Finish a step as a plain loop would, after an error of the doctor's or of the step's.

        Raises:
            Exception: where it is the step's, what the plain loop would have seen.
        """
        session = self._session
        report = go_on(
            session.training,
            batch,
            progress,
            step=session.step,
            device=session.device,
            updates=updates,
        )
        if not isinstance(error, StepError):
            self._give_up(error)
            return report
        try:
            self._begin_anew(after=session.step)
        except Exception as failure:
            self._give_up(failure)
        return report

    def _give_up(self, error: Exception) -> None:
        """Go on without a doctor, and say so once."""
        logger.warning(
            "the doctor failed at step %d and is off from here on; training goes on as in a plain "
            "loop (%s: %s)",
            self._session.step,
            type(error).__name__,
            error,
            exc_info=error,
        )
        self._is_plain = True
        # What was kept takes memory and is of no use any more.
        self._session.history.clear()

    def _structure_now(self) -> tuple[int, ...]:
        """Return what changes where parameters are added to the optimizer, frozen or unfrozen."""
        sizes = [len(group["params"]) for group in self._session.training.optimizer.param_groups]
        return (*sizes, *(parameter.requires_grad for parameter in self._parameters))

    def _begin_anew(self, *, after: int) -> None:
        """Forget the steps until `after`: from here on the training is a new one."""
        model = self._session.training.model
        self._parameters = list(model.parameters())
        self._structure = self._structure_now()
        learning = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._session.training = replace(self._session.training, learning=learning)
        self._session.history = StepHistory(memory_bytes=self.settings.memory_bytes)
        self._session.history.keep(take_snapshot(self._session.training, step=after))
        self._outside_writes.note(self._session.training)
        self._treatments.begin_anew()

    # ---- noticing

    def _examine_ahead(self, batch: Batch) -> Symptom | None:
        """Look at a batch before the step, where that can't be taken back."""
        symptom = self._session.monitor.examine_labels(batch)
        if symptom is None or self._treatments.is_dismissed(symptom) or self._is_treated():
            return None
        self._learn_ignored(batch)
        return self._session.monitor.examine_labels(batch)

    def _examine(self, outcome: StepOutcome, batch: Batch) -> Symptom | None:
        """Look at a step that was taken."""
        symptom = self._session.monitor.examine_step(outcome, step=self._session.step)
        if symptom is None or outcome.is_finite or self._is_treated():
            return symptom
        self._learn_ignored(batch)
        of_batch = self._session.monitor.examine_batch(batch)
        if of_batch is Symptom.NON_FINITE_INPUT and self._has_coped():
            return symptom
        return of_batch or symptom

    def _has_coped(self) -> bool:
        """Whether steps with inputs that aren't finite went well."""
        return any(
            self._session.monitor.examine_batch(recorded.batch) is Symptom.NON_FINITE_INPUT
            for recorded in list(self._session.history.steps)[-_NUM_COPED:-1]
            if recorded.outcome.is_taken and recorded.outcome.is_finite
        )

    def _learn_classes(self, outcome: StepOutcome) -> None:
        """Take from the first outputs how many classes there are."""
        num_classes = classes_of(outcome.outputs, outcome.labels)
        self._session.training = replace(self._session.training, num_classes=num_classes)
        self._session.monitor.num_classes = num_classes

    def _learn_ignored(self, batch: Batch) -> None:
        """Learn which labels the loss passes over, where a batch holds any that is no class."""
        if self._session.monitor.examine_labels(batch) is not None:
            training = self._session.training
            ignored = (
                training.ignored
                | ignored_labels(training, batch)
                | self._labels_learned_from(list(self._session.history.steps)[-_NUM_COPED:-1])
            )
            self._session.training = replace(self._session.training, ignored=ignored)
            self._session.monitor.ignored = ignored

    def _labels_learned_from(self, steps: Sequence[Recorded]) -> frozenset[int]:
        """Return the labels out of range in steps that went well: a mask takes care of them."""
        training = self._session.training
        learned = [
            labels_of(batch, num_classes=training.num_classes)
            for recorded in steps
            if recorded.outcome.is_taken and recorded.outcome.is_finite
            if (batch := learned_from(training, recorded)) is not None
        ]
        return frozenset(
            int(label)
            for labels in learned
            if labels is not None and training.num_classes is not None
            for label in set(labels[are_out_of_range(labels, training.num_classes)].tolist())
        )

    def _keep_state(self) -> Symptom | None:
        """Keep the state if it is good."""
        if not is_finite(self._session.training):
            return symptom_of_state(self._session.training)[0]
        symptom = self._session.monitor.examine_answers()
        step, history = self._session.step, self._session.history
        spare = history.make_room(step)
        began = time.monotonic()
        history.keep(take_snapshot(self._session.training, step=step, spare=spare))
        history.pace(copy_s=time.monotonic() - began, step_s=self._session.step_seconds)
        return symptom

    def _is_treated(self) -> bool:
        """Whether the treatment in force takes care of what a batch shows."""
        return bool(self._session.treatment.drops) or self._session.treatment.sanitises

    # ---- telling

    def _lr(self) -> float:
        rate = float(self._session.training.optimizer.param_groups[0]["lr"])
        return self._session.treatment.rate(rate, step=self._session.step)

    def _report(self, outcome: StepOutcome) -> StepReport:
        return StepReport(
            step=self._session.step,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=outcome.lr,
            outputs=outcome.returned,
            batch=outcome.batch,
            num_classes=outcome.num_classes,
            batch_size=outcome.batch_size if outcome.is_taken else 0,
        )

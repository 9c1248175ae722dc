"""Taking recorded steps again, unchanged or with one thing changed, and judging what they lead to.

A replay leaves the training in the state it came to; whoever diagnoses puts it back.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrounds.diagnosis.values import TrendPoint
from fedrounds.doctor.batches import Batch, batch_size, labels_of, take
from fedrounds.doctor.history import (
    RandomState,
    Recorded,
    Snapshot,
    StepHistory,
    device_of,
    gradients_of,
    is_finite,
    restore_schedule,
    restore_settings,
    restore_snapshot,
    take_snapshot,
)
from fedrounds.doctor.monitor import EXPLOSION, are_constant, is_beyond_chance
from fedrounds.doctor.outputs import answers_of
from fedrounds.doctor.samples import oddities
from fedrounds.doctor.stepping import (
    STEP_ERRORS,
    UNTREATED,
    Overrides,
    StepOutcome,
    TrainingState,
    prepared,
    take_step,
)

_HEALED = 1.25
"""The loss after an experiment is at most so many times the usual loss, or nothing is healed."""
_FORGOTTEN = 10.0
_KNOWN = 0.8
"""A loss of this share of the first loss, where it was a tenth of that, is knowledge lost."""
_FITTED = 0.1
_PROBE_SAMPLES = 32
_PROBE_BATCHES = 8
_NUM_DRAWS = 3

Change = Callable[[Overrides], Overrides]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A step of a replay: how it went, and the largest absolute parameter after it."""

    step: int
    outcome: StepOutcome
    largest_weight: float

    @property
    def point(self) -> TrendPoint:
        """The numbers of it that a report shows."""
        return TrendPoint(
            step=self.step,
            loss=self.outcome.loss,
            grad_norm=self.outcome.grad_norm or 0.0,
            largest_weight=self.largest_weight,
            lr=self.outcome.lr,
        )


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A replay: its steps, the last being the step that failed; `failed_at` is 0 if none did.

    `before` is the state before the last step taken.
    """

    steps: tuple[Traced, ...]
    failed_at: int
    before: Snapshot

    @property
    def last_loss(self) -> float:
        """The loss it came to, nan if there is none."""
        return self.steps[-1].outcome.loss if self.steps else math.nan


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Batches that went well, and the loss each had then: what the model knew.

    `level` is the loss the training began with.
    """

    batches: tuple[Batch, ...]
    labels: Tensor | None
    usual: float
    level: float


class OutOfTime(Exception):
    """An examination has taken as long as it may."""


class Replay:
    """Owns nothing: works on a training and the history of its training."""

    def __init__(
        self,
        training: TrainingState,
        history: StepHistory,
        *,
        level: float,
        needs_gradient: bool,
        on_replay: Callable[[], None],
        max_seconds: float,
        longest_s: float,
    ) -> None:
        # The thread's own time: a busy machine makes no diagnosis worse.
        self._ends_after = time.thread_time() + max_seconds
        self._ends_at = time.monotonic() + longest_s
        self.training = training
        self.history = history
        self.num_steps = 0
        self.allowed = math.inf
        self._needs_gradient = needs_gradient
        self._on_replay = on_replay
        self._level = level
        self.probe = self._choose_probe()

    def run(
        self,
        start: Snapshot,
        until: int,
        *,
        change: Change = lambda treatment: treatment,
        prepare: Callable[[], None] | None = None,
        convert: Callable[[Batch], Batch] = lambda batch: batch,
        is_watched: bool = False,
        num_times: int = 1,
    ) -> Trajectory:
        """Take the steps after a state again, up to and including `until`; stop where a step fails.

        Args:
            start: the state to begin with.
            until: the last step to take.
            change: what is done otherwise.
            prepare: called once the state is there, to change it.
            convert: makes another batch of each recorded batch.
            is_watched: a step after which the model isn't sane fails, too.
            num_times: how many passes over all of these steps.
        """
        restore_snapshot(self.training, start)
        if prepare is not None:
            prepare()
        traced: list[Traced] = []
        before = start
        for number, recorded in enumerate(self.history.between(start.step, until) * num_times):
            if number and recorded.step == start.step + 1:
                restore_schedule(self.training, start)
            before = take_snapshot(self.training, step=recorded.step - 1)
            newest = self._take(recorded, convert(recorded.batch), change(recorded.treatment))
            traced.append(newest)
            has_failed = not newest.outcome.is_finite or not is_finite(self.training)
            if has_failed or (is_watched and not self.is_sane()):
                return Trajectory(steps=tuple(traced), failed_at=recorded.step, before=before)
        return Trajectory(steps=tuple(traced), failed_at=0, before=before)

    def goes_well(
        self,
        before: Snapshot,
        recorded: Recorded,
        batch: Batch,
        *,
        change: Change = lambda treatment: treatment,
        prepare: Callable[[], None] | None = None,
    ) -> bool:
        """Whether a step on this batch, from the state before it, leaves a sane model."""
        treatment = change(recorded.treatment)
        least = 0.0
        if treatment.guards:
            # Where the loss as it is written is 0, the guarded loss needn't be.
            restore_snapshot(self.training, before)
            least = self.probe_loss(treatment)
        outcome = self.take(before, recorded, batch, change=change, prepare=prepare)
        return outcome.is_finite and self.is_sane(treatment, least=least)

    def take(
        self,
        before: Snapshot,
        recorded: Recorded,
        batch: Batch | None = None,
        *,
        change: Change = lambda treatment: treatment,
        prepare: Callable[[], None] | None = None,
    ) -> StepOutcome:
        """Take a step once more, from the state before it, on its own batch or another."""
        restore_snapshot(self.training, before)
        if prepare is not None:
            prepare()
        recorded.random_state.restore(device_of(self.training))
        self.count_step()
        restore_settings(self.training, recorded)
        given = recorded.batch if batch is None else batch
        return take_step(
            self.training,
            given,
            change(recorded.treatment),
            step=recorded.step,
            updates=recorded.updates,
        )

    def count_step(self) -> None:
        """Count a step that is taken once more, and call `on_replay`.

        Raises:
            OutOfTime: the examination may take no further step.
        """
        if time.thread_time() > self._ends_after or time.monotonic() > self._ends_at:
            raise OutOfTime
        self.num_steps += 1
        self._on_replay()

    def is_sane(
        self, treatment: Overrides = UNTREATED, *, is_strict: bool = False, least: float = 0.0
    ) -> bool:
        """Whether the model, as it is now, still knows what the probe's batches taught it.

        The same batches are compared with themselves: their loss is finite, not many times what it
        was when they were learned from, no worse than at the very beginning, and at most `allowed`.
        It is computed as `treatment` says; a loss of `least` is nothing special then. The strict
        form is for experiments. Model and random streams are left as they are.
        """
        if not is_finite(self.training):
            return False
        if self.probe is None:
            return True
        level, usual = max(abs(self.probe.level), least), max(abs(self.probe.usual), least)
        losses, outputs, has_gradient = self._look(self.probe.batches, treatment)
        loss = sum(losses) / len(losses)
        is_fitted = loss <= _FITTED * level
        limit = max(_HEALED * usual, level / 2) if is_strict else EXPLOSION * max(level, usual)
        has_exploded = not loss <= min(limit, self.allowed) or is_beyond_chance(
            outputs, self.probe.labels, self.training.num_classes
        )
        has_forgotten = loss > _KNOWN * level and loss > _FORGOTTEN * usual
        is_dead = not has_gradient and not is_fitted
        is_mute = outputs is not None and not is_fitted and are_constant(outputs)
        return not (has_exploded or has_forgotten or is_dead or is_mute)

    def is_alive(self) -> bool:
        """Whether any weight has a gradient on the probe; True without a probe."""
        if self.probe is None or not self._needs_gradient:
            return True
        _, outputs, has_gradient = self._look(self.probe.batches)
        return has_gradient and not (outputs is not None and are_constant(outputs))

    def probe_loss(self, treatment: Overrides = UNTREATED) -> float:
        """Return the mean loss of the probe's batches as the model is now; nan without a probe."""
        if self.probe is None:
            return math.nan
        losses, _, _ = self._look(self.probe.batches, treatment)
        return sum(losses) / len(losses)

    def _look(
        self, batches: Sequence[Batch], treatment: Overrides = UNTREATED
    ) -> tuple[list[float], Tensor | None, bool]:
        """Return the losses and outputs, and whether any weight has a gradient.

        The gradient is examined only where a lack of it was noticed: it costs as much again.
        """
        training = self.training
        buffers = [buffer.detach().clone() for buffer in training.model.buffers()]
        random_state = RandomState.now(device_of(training))
        waiting = gradients_of(training) if training.window.is_open else None
        losses: list[float] = []
        answers: list[Tensor] = []
        has_gradient = not self._needs_gradient
        try:
            for draw in range(_NUM_DRAWS):
                if draw:
                    # Where forward draws random numbers, another draw may give a finite loss.
                    torch.default_generator.manual_seed(draw)
                losses.clear()
                answers.clear()
                for batch in batches:
                    # With a graph: a gradient penalty differentiates in the loss.
                    loss, outputs = training.loss_of(batch, treatment)
                    losses.append(float(loss.detach()))
                    batch_answers = answers_of(outputs, batch_size(batch))
                    if batch_answers is not None:
                        answers.append(batch_answers.detach().float())
                    if self._needs_gradient:
                        training.optimizer.zero_grad()
                        loss.backward()  # type: ignore[no-untyped-call]  # unannotated in torch
                        has_gradient |= has_live_weights(training)
                if all(math.isfinite(value) for value in losses):
                    break
        except STEP_ERRORS:
            losses.append(math.nan)
        finally:
            training.optimizer.zero_grad()
            for parameter, gradient in zip(
                training.model.parameters(), waiting or (), strict=False
            ):
                parameter.grad = gradient
            random_state.restore(device_of(training))
            with torch.no_grad():
                for buffer, kept in zip(training.model.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
        is_alike = len({batch_answers.shape[1:] for batch_answers in answers}) == 1
        return losses, torch.cat(answers) if is_alike else None, has_gradient

    def _take(self, recorded: Recorded, batch: Batch, treatment: Overrides) -> Traced:
        recorded.random_state.restore(device_of(self.training))
        restore_settings(self.training, recorded)
        self.count_step()
        outcome = take_step(
            self.training, batch, treatment, step=recorded.step, updates=recorded.updates
        )
        parameters = (
            parameter.detach()
            for parameter in self.training.model.parameters()
            if parameter.numel() > 0
        )
        return Traced(
            step=recorded.step,
            outcome=outcome.without_tensors(),
            largest_weight=max(
                (float(parameter.abs().max()) for parameter in parameters), default=0.0
            ),
        )

    def _choose_probe(self) -> Probe | None:
        """Choose early batches whose loss was nothing special, without samples that look odd."""
        steps = [
            recorded._replace(batch=learned)
            for recorded in list(self.history.steps)[:-1]
            if recorded.outcome.is_taken and recorded.outcome.is_finite
            if (learned := learned_from(self.training, recorded)) is not None
            and batch_size(learned)
        ]
        early = sorted(abs(recorded.outcome.loss) for recorded in steps[:16])
        bound = 3 * early[len(early) // 2] if early else math.inf
        chosen: list[Batch] = []
        losses: list[float] = []
        num = 0
        for recorded in steps:
            if num >= _PROBE_SAMPLES or len(chosen) == _PROBE_BATCHES:
                break
            if abs(recorded.outcome.loss) <= bound and not self._odd_positions(recorded.batch):
                chosen.append(recorded.batch)
                losses.append(recorded.outcome.loss)
                num += batch_size(recorded.batch)
        level = self._level
        if not chosen:
            chosen = self._cleaned()
            if not chosen:
                return None
            restore_snapshot(self.training, self.history.snapshots[0])
            losses, _, _ = self._look(chosen)
            if not all(math.isfinite(loss) for loss in losses):
                return None
            level = max(abs(loss) for loss in losses)
        labels = [
            batch_labels
            for batch in chosen
            if (batch_labels := labels_of(batch, num_classes=self.training.num_classes)) is not None
        ]
        is_alike = len({batch_labels.shape[1:] for batch_labels in labels}) == 1
        return Probe(
            batches=tuple(chosen),
            labels=torch.cat(labels) if is_alike else None,
            usual=sum(losses) / len(losses),
            level=level,
        )

    def _cleaned(self) -> list[Batch]:
        """Return the oldest batches without the samples that look odd."""
        cleaned: list[Batch] = []
        for recorded in list(self.history.steps)[:2]:
            odd = self._odd_positions(recorded.batch)
            good = [number for number in range(batch_size(recorded.batch)) if number not in odd]
            if good:
                cleaned.append(take(recorded.batch, good))
        return cleaned[:1]

    def _odd_positions(self, batch: Batch) -> set[int]:
        training = self.training
        return set(
            oddities(batch, num_classes=training.num_classes, healthy=(), ignored=training.ignored)
        )


def learned_from(training: TrainingState, recorded: Recorded) -> Batch | None:
    """Return what of a recorded batch was learned from, None if nothing was."""
    return prepared(recorded.batch, recorded.treatment, training, step=recorded.step)


def has_live_weights(training: TrainingState) -> bool:
    """Whether any weight has a gradient whose norm isn't zero, or no weight has a gradient at all.

    As the norm of a step is measured: float32 has zero for that of gradients below 1e-23.
    """
    gradients = [
        weight.grad for weight in training.learning if weight.ndim > 1 and weight.grad is not None
    ]
    return not gradients or any(bool(grad.norm() != 0) for grad in gradients)

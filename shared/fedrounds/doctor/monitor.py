"""Noticing that a training goes wrong, from numbers that a step has at hand anyway.

What isn't finite is certain. Losses that jump and answers that are all the same are suspicions: the
replay decides whether the model is harmed.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedrounds.diagnosis.values import StepPhase, Symptom
from fedrounds.doctor.batches import (
    IGNORED_LABEL,
    Batch,
    are_out_of_range,
    inputs_of,
    labels_of,
)
from fedrounds.doctor.stepping import StepOutcome

EXPLOSION = 5.0
"""A loss of so many times its usual level is suspicious."""
INTERVAL = 8
"""Steps between two looks at what needs no look at every step."""
_NUM_FIRST = 5
_NUM_KEPT = 64
_BAND = 20.0
"""Robust standard deviations around the median of the last losses."""
_CHANCE = 30.0
"""A cross-entropy of so many times that of guessing is no way to begin."""
_NUM_DEAD = 3
_NUM_WATCHED = 16
"""For so many steps the gradient is measured in each, to know what is usual."""
_NUM_PERSISTING = 8
_MOST_PERSISTING = 0.75
_COLLAPSE_STEPS = 16
_COLLAPSE_SAMPLES = 128
_MAX_SHARE = 0.9
"""Where one class has a larger share of the labels, answering it always is what was learned."""
_NOT_FITTED = 0.1
"""Gradients of zero are what to expect where the loss is below this share of its first level."""


class _Seen(NamedTuple):
    step: int
    loss: float
    grad_norm: float | None
    is_dead: bool


class Monitor:
    """Knows the losses and gradient norms of the last steps, and what is usual for them."""

    def __init__(self, *, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self.ignored: Collection[int] = (IGNORED_LABEL,)
        self._first: list[_Seen] = []
        self._seen: deque[_Seen] = deque(maxlen=_NUM_KEPT)
        self._answered: deque[tuple[int, StepOutcome]] = deque(maxlen=_COLLAPSE_STEPS)
        self._accuracies: deque[float] = deque(maxlen=_COLLAPSE_STEPS)
        self._ceiling = math.inf

    @property
    def first_level(self) -> float:
        """The loss of the first step, which no update can have spoilt; nan before it.

        Where the first steps had no gradient, they made no update either: the largest loss up to
        the first step with a gradient.
        """
        level = math.nan
        for seen in self._first:
            level = level if abs(seen.loss) <= abs(level) else seen.loss
            if seen.grad_norm != 0:
                break
        return level

    @property
    def usual_norm(self) -> float | None:
        """The median gradient norm of the last steps, None where they are too few."""
        norms = [seen.grad_norm for seen in self._seen if seen.grad_norm is not None]
        return median(norms) if len(norms) >= _NUM_FIRST else None

    @property
    def losses(self) -> list[float]:
        """The losses of the last steps, the newest last."""
        return [seen.loss for seen in self._seen]

    def usual_loss(self, *, before: int) -> float | None:
        """Return the median loss of the last steps before `before`, None where they are too few."""
        losses = [seen.loss for seen in self._seen if seen.step < before]
        return median(losses) if len(losses) >= _NUM_FIRST else None

    def bar(self, outcome: StepOutcome) -> float:
        """Return the loss above which what a step shows persists."""
        return self._ceiling if math.isfinite(self._ceiling) else abs(outcome.loss) / 2

    def persists(self, symptom: Symptom, *, bar: float) -> bool:
        """Whether the last steps still show the symptom of a step before them."""
        last = list(self._seen)[-_NUM_PERSISTING:]
        if symptom is Symptom.DEAD_NETWORK:
            return all(seen.is_dead for seen in last)
        if symptom is Symptom.COLLAPSE:
            return self.examine_answers() is Symptom.COLLAPSE
        return sum(seen.loss > bar for seen in last) >= _MOST_PERSISTING * len(last)

    def needs_measure(self, step: int) -> bool:
        """Whether the gradient of a step is to be measured.

        Now and then is enough: a gradient that isn't finite shows in the steps after it at the
        latest, and a replay finds the step that it came up in.
        """
        is_usual_known = step > _NUM_WATCHED and step % INTERVAL != 0
        return not is_usual_known or (bool(self._seen) and self._seen[-1].is_dead)

    def examine_batch(self, batch: Batch) -> Symptom | None:
        """Look for what is wrong with a batch itself."""
        if not all(bool(inputs.isfinite().all()) for inputs in inputs_of(batch)):
            return Symptom.NON_FINITE_INPUT
        return self.examine_labels(batch)

    def examine_labels(self, batch: Batch) -> Symptom | None:
        """Look whether a batch's labels are classes."""
        labels = labels_of(batch, num_classes=self.num_classes)
        if self.num_classes is None or labels is None:
            return None
        is_wrong = bool(are_out_of_range(labels, self.num_classes, self.ignored).any())
        return Symptom.LABEL_OUT_OF_RANGE if is_wrong else None

    def examine_step(self, outcome: StepOutcome, *, step: int) -> Symptom | None:
        """Look at a step that was taken; what is well is remembered."""
        if outcome.error is not None:
            return Symptom.STEP_FAILED
        if not outcome.is_taken:
            return None
        if not outcome.is_finite:
            return symptom_of(outcome)
        has_exploded = self._has_exploded(outcome)
        seen = _Seen(step, outcome.loss, outcome.grad_norm, outcome.has_dead_weights)
        self._seen.append(seen)
        if len(self._first) < _NUM_FIRST:
            self._first.append(seen)
        if len(self._first) < _NUM_FIRST or step % INTERVAL == 0:
            self._ceiling = self._find_ceiling()
        if outcome.outputs is not None:
            self._answered.append((step, outcome._replace(returned=None)))
        if has_exploded:
            return Symptom.LOSS_EXPLOSION
        return Symptom.DEAD_NETWORK if self._is_dead() else None

    def examine_answers(self) -> Symptom | None:
        """Look at the answers of the last steps together; called now and then."""
        if not self._answered or (pair := _answered_labels(self._answered[-1][1])) is None:
            return None
        outputs, labels = pair
        if labels.numel() == 0:
            return None
        answers = outputs.argmax(dim=1)
        self._accuracies.append((answers == labels).sum().item() / labels.numel())
        if not bool((answers == answers.flatten()[0]).all()):
            return None
        return self._examine_one_answer()

    def _examine_one_answer(self) -> Symptom | None:
        """Look whether one class is the answer to everything, as it is in the newest batch."""
        answered = [_answered_labels(outcome) for _, outcome in self._answered]
        pairs = [pair for pair in answered if pair is not None]
        labels = torch.cat([batch_labels.flatten() for _, batch_labels in pairs])
        known = labels[labels >= 0].long()
        if len(pairs) < _COLLAPSE_STEPS or len(known) < _COLLAPSE_SAMPLES:
            return None
        share = float(known.bincount().max()) / len(known)
        if share > _MAX_SHARE:
            return None
        answers = torch.cat([outputs.argmax(dim=1).flatten() for outputs, _ in pairs])
        window = list(self._accuracies)[:-2]
        has_learned = len(window) > 1 and sum(window) / len(window) >= share + 0.2
        is_one_answer = has_learned and not bool((answers != answers[0]).any())
        is_mute = all(are_constant(outputs) for outputs, _ in pairs)
        return Symptom.COLLAPSE if is_one_answer or is_mute else None

    def rewind(self, step: int) -> None:
        """Forget what was seen after `step`."""
        self._first = [seen for seen in self._first if seen.step <= step]
        self._seen = deque((seen for seen in self._seen if seen.step <= step), maxlen=_NUM_KEPT)
        self._answered = deque(
            (record for record in self._answered if record[0] <= step), maxlen=_COLLAPSE_STEPS
        )

    def _has_exploded(self, outcome: StepOutcome) -> bool:
        if len(self._first) < _NUM_FIRST and is_beyond_chance(
            outcome.outputs, outcome.labels, self.num_classes
        ):
            return True
        if outcome.loss <= self._ceiling:
            return False
        self._ceiling = self._find_ceiling()
        return outcome.loss > self._ceiling

    def _find_ceiling(self) -> float:
        """Return the loss above which there is a suspicion; infinite before the first update."""
        if len(self._first) < _NUM_FIRST and all(seen.grad_norm == 0 for seen in self._first):
            return math.inf
        losses = [seen.loss for seen in self._seen]
        usual = median(losses)
        deviation = median(abs(loss - usual) for loss in losses) * 1.4826
        level = max(abs(self.first_level), abs(usual))
        band = abs(usual) + _BAND * deviation
        # Far below its first level a jump counts by what is usual by now.
        settled = max(EXPLOSION * abs(usual), band)
        is_settled = len(losses) >= _NUM_FIRST and settled < abs(self.first_level)
        return abs(self.first_level) if is_settled else max(EXPLOSION * level, band)

    def _is_dead(self) -> bool:
        if not self._seen[-1].is_dead:
            return False
        last = list(self._seen)[-_NUM_DEAD:]
        floor = _NOT_FITTED * abs(self.first_level)
        return len(last) == _NUM_DEAD and all(seen.is_dead and seen.loss > floor for seen in last)


def _answered_labels(outcome: StepOutcome) -> tuple[Tensor, Tensor] | None:
    """Return a step's outputs and the labels that they answer, None where they answer none."""
    outputs, labels = outcome.outputs, outcome.labels
    if outputs is None or labels is None or not _fit(outputs, labels):
        return None
    return outputs, labels


def _fit(outputs: Tensor, labels: Tensor) -> bool:
    """Whether the outputs [n, classes, ...] answer the labels [n, ...] with two classes or more."""
    is_wide = outputs.ndim >= 2 and outputs.shape[1] >= 2
    return is_wide and outputs.shape[:1] + outputs.shape[2:] == labels.shape


def classes_of(outputs: Tensor | None, labels: Tensor | None) -> int | None:
    """Return the number of classes in a batch's outputs, None if that can't be known."""
    if outputs is None or labels is None or labels.numel() == 0 or not _fit(outputs, labels):
        return None
    num_classes = outputs.shape[1]
    return None if bool(are_out_of_range(labels, num_classes).any()) else num_classes


def symptom_of(outcome: StepOutcome) -> Symptom:
    """Return what a step shows whose loss or gradient isn't finite."""
    if math.isfinite(outcome.loss):
        return Symptom.NON_FINITE_GRADIENT
    outputs = outcome.outputs
    has_bad_output = outputs is not None and not bool(outputs.isfinite().all())
    return Symptom.NON_FINITE_FORWARD if has_bad_output else Symptom.NON_FINITE_LOSS


def are_constant(outputs: Tensor) -> bool:
    """Whether the outputs [n, ...] are the same for every sample, but for rounding."""
    if len(outputs) < 2 or outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    if not bool(outputs.isfinite().all()):
        return False
    spread = (outputs - outputs[:1]).abs().max()
    return float(spread) <= 1e-4 * max(float(outputs.abs().max()), 1e-30)


def is_beyond_chance(
    outputs: Tensor | None, labels: Tensor | None, num_classes: int | None
) -> bool:
    """Whether the outputs are confidently wrong beyond all measure, whatever the loss is."""
    if num_classes is None or num_classes < 2 or outputs is None or labels is None:
        return False
    if not _fit(outputs, labels) or outputs.shape[1] != num_classes:
        return False
    # Labels that the loss passes over are no classes.
    is_class = (labels >= 0) & (labels < num_classes)
    known = torch.where(is_class, labels.long(), -1)
    total = functional.cross_entropy(outputs.float(), known, ignore_index=-1, reduction="sum")
    return float(total) > _CHANCE * math.log(num_classes) * max(1, int(is_class.sum()))


PHASES: Mapping[Symptom, StepPhase] = {
    Symptom.NON_FINITE_LOSS: StepPhase.LOSS,
    Symptom.NON_FINITE_GRADIENT: StepPhase.BACKWARD,
    Symptom.DEAD_NETWORK: StepPhase.BACKWARD,
    Symptom.NON_FINITE_OPTIMIZER_STATE: StepPhase.OPTIMIZER,
    Symptom.NON_FINITE_PARAMETER: StepPhase.OPTIMIZER,
}
"""Where to look first for what made a number bad; elsewhere in the forward pass."""

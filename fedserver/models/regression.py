"""Detects that a new global model is bad, from its evaluation and the evaluations before it.

A model is bad if

- its loss isn't finite; or
- the loss exploded: it is above all of the run so far, and far above the newest of them: more than
  10 robust standard deviations (1.4826 times the median absolute deviation, as for normal values:
  Rousseeuw and Croux 1993) from their median, of which each counts as half the median at least; or
- it collapsed: it answers one class to nearly everything, though the examples hold others, and a
  model before it was at least half way from there to knowing all.

A run begins with models that know nothing, and after a cohort of few classes a model forgets the
other classes for a while. Neither is a regression, so the rules ask for a fall from what was
reached.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedrounds.diagnosis.values import Symptom
from fedserver.records import ModelEvaluation

_NUM_COMPARED = 10
_WIDTH = 10.0
_TO_DEVIATION = 1.4826
_LEAST_SPREAD = 0.5
_NEARLY_ALL = 0.99


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What is wrong with a model, and the numbers that show it, in a sentence."""

    symptom: Symptom
    reason: str


def detect_regression(
    evaluation: ModelEvaluation, before: Sequence[ModelEvaluation]
) -> Regression | None:
    """Return the regression that a model's evaluation shows, None if it shows none.

    `before` are the evaluations of the run's good models, oldest first.
    """
    if evaluation.loss is None:
        return Regression(symptom=Symptom.NON_FINITE_LOSS, reason="its loss isn't finite")
    losses = [earlier.loss for earlier in before if earlier.loss is not None]
    bound = _loss_bound(losses)
    if evaluation.loss > bound:
        return Regression(
            symptom=Symptom.LOSS_EXPLOSION,
            reason=f"its loss is {evaluation.loss:.4g}, that of the models before it at most "
            f"{max(losses):.4g}; {bound:.4g} is the bound",
        )
    return _detect_collapse(evaluation, before)


def _loss_bound(losses: Sequence[float]) -> float:
    """Return the loss above which a model's has exploded, infinity where there were none before."""
    if not losses:
        return math.inf
    newest = losses[-_NUM_COMPARED:]
    median = statistics.median(newest)
    mad = statistics.median(abs(loss - median) for loss in newest)
    spread = max(_TO_DEVIATION * mad, _LEAST_SPREAD * abs(median))
    return max(*losses, median + _WIDTH * spread)


def _detect_collapse(
    evaluation: ModelEvaluation, before: Sequence[ModelEvaluation]
) -> Regression | None:
    confusion = evaluation.confusion
    reached = max((earlier.accuracy or 0.0 for earlier in before), default=0.0)
    if confusion is None:
        return None
    num_answers = sum(map(sum, confusion))
    counts = [sum(row[answer] for row in confusion) for answer in range(len(confusion[0]))]
    answer = max(range(len(counts)), key=counts.__getitem__)
    if counts[answer] < _NEARLY_ALL * num_answers:
        return None
    # The share that a model is right about that always gives this answer. The last number stands
    # for no class.
    share = sum(confusion[answer]) / num_answers if answer < len(confusion) else 0.0
    if share == 1 or reached < share + (1 - share) / 2:
        return None
    what = f"class {answer}" if answer < len(confusion) else "no class at all"
    return Regression(
        symptom=Symptom.COLLAPSE,
        reason=f"it answers {what} to {counts[answer]} of {num_answers} examples; the best model "
        f"before it was right about {reached:.2%} of them",
    )

"""Whether a new global model is bad: the bounds are derived by hand."""

import pytest

from fedrounds.diagnosis.values import Symptom
from fedserver.models.regression import detect_regression
from fedserver.records import ModelEvaluation


def evaluation(
    loss: float | None = 0.5, *, accuracy: float = 0.5, confusion: list[list[int]] | None = None
) -> ModelEvaluation:
    """Return an evaluation as the store keeps it."""
    return ModelEvaluation(accuracy=accuracy, loss=loss, confusion=confusion)


def losses(*values: float) -> list[ModelEvaluation]:
    """Return the evaluations of good models with these losses."""
    return [evaluation(value) for value in values]


def test_a_loss_that_is_no_number_is_an_alarm_from_the_first_round_on() -> None:
    """It needs no history."""
    alarm = detect_regression(evaluation(None), [])
    assert alarm is not None
    assert alarm.symptom is Symptom.NON_FINITE_LOSS


@pytest.mark.parametrize(
    ("before", "bound"),
    [
        # One: its median is itself, its deviation 0, so half of it counts: 2 + 10 * 1.
        ([2.0], 12.0),
        # Median 0.3, deviations 0.1, 0, 0.1: 1.4826 * 0.1 < 0.15, so 0.3 + 10 * 0.15.
        ([0.4, 0.3, 0.2], 1.8),
        # Median 0.15, so 0.9; but the first was above that, and nothing is lost by less.
        ([1.2, 0.2, 0.1, 0.1], 1.2),
        # Median 5, deviations 4, 4, 4, 4, 0, so 5 + 10 * 1.4826 * 4.
        ([1.0, 9.0, 1.0, 9.0, 5.0], 5 + 59.304),
        # Only the newest ten: of 1 and ten times 0.2, still not below the first loss.
        ([1.0, *[0.2] * 10], 1.2),
    ],
)
def test_a_loss_far_above_all_before_is_an_alarm(before: list[float], bound: float) -> None:
    """Up to the bound there is no regression, above it there is."""
    assert detect_regression(evaluation(bound * 0.999), losses(*before)) is None
    alarm = detect_regression(evaluation(bound * 1.001), losses(*before))
    assert alarm is not None
    assert alarm.symptom is Symptom.LOSS_EXPLOSION
    assert f"at most {max(before):.4g}" in alarm.reason


def test_the_first_finite_loss_is_no_alarm_whatever_it_is() -> None:
    """There is nothing to compare it with."""
    assert detect_regression(evaluation(1e9), []) is None


# Three classes with 40, 30 and 30 examples; the last column is for answers that name none.
ALL_FIRST = [[40, 0, 0, 0], [30, 0, 0, 0], [30, 0, 0, 0]]
ALL_NONE = [[0, 0, 0, 40], [0, 0, 0, 30], [0, 0, 0, 30]]


@pytest.mark.parametrize(
    ("confusion", "reached", "is_alarm"),
    [
        # Class 0 alone is right about 0.4; half way from there to 1 is 0.7.
        (ALL_FIRST, 0.71, True),
        (ALL_FIRST, 0.69, False),
        # No class at all is right about nothing; half way is 0.5.
        (ALL_NONE, 0.51, True),
        (ALL_NONE, 0.49, False),
        # 1 of 100 is answered otherwise: nearly all. 2 of 100: not any more.
        ([[40, 0, 0, 0], [29, 1, 0, 0], [30, 0, 0, 0]], 0.71, True),
        ([[40, 0, 0, 0], [28, 2, 0, 0], [30, 0, 0, 0]], 0.71, False),
        # Examples of one class only: to answer it is right.
        ([[50, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], 1.0, False),
    ],
)
def test_one_class_for_everything_is_an_alarm_after_a_better_model(
    confusion: list[list[int]], reached: float, is_alarm: bool
) -> None:
    """Judged by the classes that are there, and by what the run had reached."""
    alarm = detect_regression(evaluation(confusion=confusion), [evaluation(accuracy=reached)])
    assert (alarm is not None) == is_alarm
    if alarm is not None:
        assert alarm.symptom is Symptom.COLLAPSE
    assert detect_regression(evaluation(confusion=confusion), []) is None

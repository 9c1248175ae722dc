"""What the server changes when clients agree on a cause: the numbers are derived by hand."""

from dataclasses import replace
from typing import Any

import pytest

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Remedy,
    RemedyKind,
)
from fedrounds.types import TrainingConfig
from fedserver.records import NO_ADJUSTMENTS, Adjustments
from fedserver.rounds.adjustments import (
    Reports,
    adjusted,
    adjustment_text,
    after_attempt,
    after_bad_model,
)
from tests.factories import make_diagnosis

NONE = Remedy(kind=RemedyKind.NONE)


def reported(
    cause: Cause,
    name: ExperimentName = ExperimentName.UNCHANGED,
    *healing: float,
    failing: tuple[float, ...] = (),
    remedy: Remedy = NONE,
) -> Diagnosis:
    """Return a diagnosis whose experiments healed it with some values and not with others."""
    tried = [
        *(Experiment(name=name, value=value, is_healed=False) for value in failing),
        *(Experiment(name=name, value=value, is_healed=True) for value in healing),
    ]
    return make_diagnosis(cause=cause, experiments=tuple(tried), remedy=remedy)


RATE = reported(Cause.LEARNING_RATE, ExperimentName.LOWER_RATE, 0.5)


def after(reports: Reports, before: Adjustments = NO_ADJUSTMENTS, **changes: Any) -> Adjustments:  # noqa: ANN401
    """Return what follows from reports of an attempt that three clients answered."""
    values = {"round_number": 2, "is_done": True, "num_answers": 3, "max_steps": 3} | changes
    return after_attempt(before, reports, **values)[0]


@pytest.mark.parametrize(
    ("num_reporting", "num_answers", "acts"),
    [
        (1, 1, False),  # one client is never enough, though it is everybody
        (1, 2, False),
        (2, 2, True),
        (2, 6, True),  # a third
        (2, 7, False),  # 2 of 7 are less than a third
        (3, 9, True),
        (3, 10, False),
    ],
)
def test_two_clients_and_a_third_of_those_that_answered_must_agree(
    num_reporting: int, num_answers: int, acts: bool
) -> None:
    """Fewer say nothing about the run; what is said of it names them."""
    reports = [(client, RATE) for client in range(num_reporting)]
    adjustments, shared = after_attempt(
        NO_ADJUSTMENTS,
        reports,
        round_number=2,
        is_done=False,
        num_answers=num_answers,
        max_steps=3,
    )
    assert (adjustments.lr_factor == 0.5) == acts
    assert [cause.clients for cause in shared] == [tuple(range(num_reporting))] * acts
    # A client that reports a cause twice is one client, and two causes aren't the same cause.
    assert after([(0, RATE), (0, RATE)], is_done=False) == NO_ADJUSTMENTS
    other = reported(Cause.EXPLODING_GRADIENT, ExperimentName.CLIPPED_GRADIENT, 1.0)
    assert after([(0, RATE), (1, other)], is_done=False) == NO_ADJUSTMENTS


@pytest.mark.parametrize(
    ("first", "second", "factor"),
    [
        ((0.5,), (0.5,), 0.5),
        ((0.1, 0.5), (0.1,), 0.1),  # 0.5 healed the first, only 0.1 the second
        ((), (), 0.5),  # nobody knows what helps
        ((), (0.25,), 0.25),
        ((0.9,), (0.9,), 0.5),  # at least one half
        ((0.001,), (0.5,), 0.1),  # at most to a tenth
        ((float("nan"), 0.25), (-1.0, 0.5), 0.25),  # what is no factor doesn't count
    ],
)
def test_the_rate_is_multiplied_by_what_heals_it_for_all(
    first: tuple[float, ...], second: tuple[float, ...], factor: float
) -> None:
    """Of each client the gentlest factor that healed, of the clients the strongest."""
    name = ExperimentName.LOWER_RATE
    reports = [
        (0, reported(Cause.LEARNING_RATE, name, *first, failing=(0.7,))),
        (1, reported(Cause.LEARNING_RATE, name, *second)),
    ]
    adjustments = after(reports, is_done=False)
    assert adjustments == Adjustments(lr_factor=factor, num_lowered=1)
    assert adjusted(TrainingConfig(lr=0.2), adjustments) == TrainingConfig(lr=0.2 * factor)


def test_the_remedy_that_worked_counts_too() -> None:
    """0.25 is what the client itself did; it tried no other."""
    cured = Remedy(kind=RemedyKind.LOWER_RATE, value=0.25, is_working=True)
    reports = [(client_id, reported(Cause.LEARNING_RATE, remedy=cured)) for client_id in range(2)]
    assert after(reports).lr_factor == 0.25


def test_steps_are_bounded_and_taken_back_one_by_one() -> None:
    """1 -> 1/2 -> 1/4 -> 1/8, no further; then a good round each: 1/4, 1/2, 1, and it may again."""
    reports = [(0, RATE), (1, RATE)]
    adjustments = NO_ADJUSTMENTS
    factors = []
    for _ in range(4):
        adjustments = after(reports, adjustments, is_done=False)
        factors.append(adjustments.lr_factor)
    assert factors == [0.5, 0.25, 0.125, 0.125]
    # A failed attempt takes nothing back, and neither does a round in which one still complains.
    assert after([], adjustments, is_done=False) == adjustments
    assert after([(0, RATE)], adjustments) == adjustments
    factors = []
    for _ in range(3):
        adjustments = after([], adjustments)
        factors.append(adjustments.lr_factor)
    assert factors == [0.25, 0.5, 1.0]
    assert adjustments == NO_ADJUSTMENTS
    assert after(reports, replace(adjustments, lr_factor=0.3, num_lowered=3)).lr_factor == 0.3


def test_gradients_are_clipped_at_the_median_of_what_healed_them() -> None:
    """Norms 2, 8 and 3: 3. Once more at most half of it, 1.5; released 1.5, 3, 6, not at all."""

    def exploding(*norms: float) -> Diagnosis:
        return reported(Cause.EXPLODING_GRADIENT, ExperimentName.CLIPPED_GRADIENT, *norms)

    reports = [(0, exploding(2.0)), (1, exploding(1.0, 8.0)), (2, exploding(3.0))]
    adjustments = after(reports, is_done=False)
    assert adjustments == Adjustments(clip_norm=3.0, num_clipped=1)
    assert adjusted(TrainingConfig(), adjustments).clip_norm == 3.0
    assert adjusted(TrainingConfig(clip_norm=1.0), adjustments).clip_norm == 1.0
    adjustments = after(reports, adjustments, is_done=False)
    assert adjustments == Adjustments(clip_norm=1.5, num_clipped=2)
    norms = []
    for _ in range(3):
        adjustments = after([], adjustments)
        norms.append(adjustments.clip_norm)
    assert norms == [3.0, 6.0, None]
    assert adjustments == NO_ADJUSTMENTS
    # What no number of ours could be doubled or halved from is cut to what could be.
    for reported_norm, norm in ((1.7e308, 1e6), (5e-324, 1e-4)):
        adjustments = after([(0, exploding(reported_norm)), (1, exploding(reported_norm))])
        assert adjustments == Adjustments(clip_norm=norm, num_clipped=1)
    # Nobody knows a norm that heals it: nothing to clip at.
    assert after([(0, exploding()), (1, exploding())]) == NO_ADJUSTMENTS


def test_the_first_model_is_drawn_anew_twice_at_most() -> None:
    """And only while there is no other: in a later round, or after a good attempt, no more."""
    bad = reported(Cause.BAD_INITIALISATION)
    reports = [(0, bad), (1, bad)]
    first: dict[str, Any] = {"round_number": 1, "is_done": False}
    once = after(reports, **first)
    assert once == Adjustments(num_redraws=1)
    assert after(reports, once, **first).num_redraws == 2
    assert after(reports, replace(once, num_redraws=2), **first).num_redraws == 2
    assert after(reports, once, round_number=1, is_done=True).num_redraws == 1
    assert after(reports, once, round_number=2, is_done=False).num_redraws == 1


def test_a_cause_without_a_setting_is_said_and_nothing_changed() -> None:
    """Several clients with bad data are a fact for a person; so is a switch that is off."""
    bad = make_diagnosis(cause=Cause.BAD_DATA)
    adjustments, (shared,) = after_attempt(
        NO_ADJUSTMENTS,
        [(4, bad), (1, bad)],
        round_number=1,
        is_done=True,
        num_answers=2,
        max_steps=3,
    )
    assert adjustments == NO_ADJUSTMENTS
    assert (shared.cause, shared.clients) == (Cause.BAD_DATA, (1, 4))
    assert shared.change == "nothing is changed: no setting of a round would help"
    adjustments, (shared,) = after_attempt(
        NO_ADJUSTMENTS,
        [(0, RATE), (1, RATE)],
        round_number=1,
        is_done=True,
        num_answers=2,
        max_steps=0,
    )
    assert adjustments == NO_ADJUSTMENTS
    assert "--max-adjustments is 0" in shared.change


def test_a_bad_model_halves_rate_and_band() -> None:
    """The band down to an eighth; both come back with good rounds."""
    adjustments = after_bad_model(NO_ADJUSTMENTS, max_steps=3)
    assert adjustments == Adjustments(lr_factor=0.5, num_lowered=1, norm_band_factor=0.5)
    for _ in range(4):
        adjustments = after_bad_model(adjustments, max_steps=3)
    assert (adjustments.lr_factor, adjustments.norm_band_factor) == (0.125, 0.5)
    assert after([], adjustments).norm_band_factor == 1
    assert after_bad_model(NO_ADJUSTMENTS, max_steps=0) == NO_ADJUSTMENTS


def test_adjustments_are_kept_as_what_differs_and_described_in_words() -> None:
    """Nothing is an empty object and no words."""
    assert (NO_ADJUSTMENTS.as_json(), adjustment_text(NO_ADJUSTMENTS)) == ({}, "")
    adjustments = Adjustments(lr_factor=0.25, num_lowered=2, clip_norm=1.5, num_redraws=1)
    kept: dict[str, Any] = adjustments.as_json()
    assert Adjustments(**kept) == adjustments
    assert adjustment_text(adjustments) == (
        "rate times 0.25, gradients clipped at 1.5, first model drawn anew (1)"
    )

"""A remedy is eased while learning goes on as well, and tightened where it doesn't."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedrounds.doctor import Doctor
from fedrounds.doctor.history import Snapshot
from fedrounds.doctor.release import Release
from fedrounds.doctor.stepping import UNTREATED, Overrides

FIRST_LEVEL = 2.0
WELL = [0.5] * 16
START = Snapshot(step=0, tensors=[], optimizer_state=[], groups=[], scheduler_state=None)
SLOW = replace(UNTREATED, rate_factor=1e-6)


def eased(release: Release, treatment: Overrides, *, times: int) -> Overrides:
    """Return a treatment after so many easings, all of which did well."""
    for number in range(times):
        assert release.does_well(WELL, first_level=FIRST_LEVEL)
        treatment = release.ease(treatment, START, WELL, step=32 * (number + 1))
    return treatment


def begun(treatment: Overrides) -> Release:
    """Return the release of a remedy that came into force at step 0."""
    release = Release()
    release.begin(treatment, step=0)
    return release


def test_each_easing_that_does_well_is_followed_by_a_larger_easing() -> None:
    """Factors 2, 4, 16 and 256: 2^15 = 32768 in four easings, and the rate's own in the fifth."""
    assert eased(begun(SLOW), SLOW, times=4).rate_factor == pytest.approx(1e-6 * 2**15)
    assert eased(begun(SLOW), SLOW, times=5).rate_factor == 1.0


def test_a_large_easing_that_does_harm_is_followed_by_a_small_easing() -> None:
    release = begun(SLOW)
    treatment = eased(release, SLOW, times=3)
    assert treatment.rate_factor == pytest.approx(1e-6 * 2**7)
    assert not release.does_well([1.0] * 16, first_level=FIRST_LEVEL)
    back = release.back(step=128)
    assert back.rate_factor == pytest.approx(1e-6 * 2**3)
    assert release.ease(back, START, WELL, step=160).rate_factor == pytest.approx(1e-6 * 2**4)


def test_below_the_rate_that_does_harm_the_remedy_is_halved_and_held() -> None:
    """1e-6, 2e-6 on trial and well, 8e-6 on trial and bad, 4e-6 on trial and bad: 1e-6 stays."""
    release = begun(SLOW)
    eased(release, SLOW, times=2)
    back = release.back(step=96)
    assert back.rate_factor == pytest.approx(2e-6)
    assert release.ease(back, START, WELL, step=128).rate_factor == pytest.approx(4e-6)
    back = release.back(step=160)
    assert back.rate_factor == pytest.approx(1e-6)
    assert release.ease(back, START, WELL, step=192) == back
    assert not release.is_on_trial


def test_harm_that_comes_late_is_noticed_and_ends_at_the_remedy_itself() -> None:
    """Of the 1.5 learned a quarter is lost at 0.875; half of the remedy is never taken."""
    release = begun(SLOW)
    eased(release, SLOW, times=2)
    for step in (96, 128, 160):
        treatment = release.back(step=step)
        treatment = release.ease(treatment, START, WELL, step=step + 32)
    assert not release.is_on_trial
    assert release.does_well([0.87] * 16, first_level=FIRST_LEVEL)
    assert not release.does_well([0.88] * 16, first_level=FIRST_LEVEL)
    assert release.back(step=400).rate_factor == SLOW.rate_factor


def test_a_bound_on_the_rate_is_eased_and_lifted_as_a_norm_is() -> None:
    """Times 2, 8 and 128: the third is beyond 64 times the remedy's, and binds no more."""
    bound = replace(UNTREATED, max_rate=0.5, clip_norm=3.0)
    second = eased(begun(bound), bound, times=2)
    assert (second.max_rate, second.clip_norm) == (4.0, 24.0)
    third = eased(begun(bound), bound, times=3)
    assert (third.max_rate, third.clip_norm) == (math.inf, None)


def test_what_is_not_slowed_is_never_due() -> None:
    assert not begun(UNTREATED).is_due(10**6)
    assert begun(SLOW).is_due(32)
    assert not begun(SLOW).is_due(31)


def test_what_an_eased_rate_did_in_the_last_steps_is_undone_at_the_end() -> None:
    """Between two looks at the easing: only the end of training can see it."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(10.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)
    doctor = Doctor(
        model,
        optimizer,
        # Its curvature is 1: the weight runs away from a rate of 2 on.
        lambda model, batch: 0.5 * (model(batch) - 1.0).square().mean(),
        treatment=replace(UNTREATED, rate_factor=0.25),
    )
    doctor._treatments.release.begin(doctor.treatment, step=0)
    for _ in range(32):
        doctor.step(torch.ones(1, 1))
    assert doctor.treatment.rate_factor == 0.5
    at_easing = abs(float(model.weight.detach()) - 1.0)
    # Half of it is a little more than 2, a quarter is just right.
    optimizer.param_groups[0]["lr"] = 4.08
    for _ in range(16):
        doctor.step(torch.ones(1, 1))
    assert abs(float(model.weight.detach()) - 1.0) > 1.5 * at_easing
    doctor.finish()
    assert abs(float(model.weight.detach()) - 1.0) < 0.01
    assert doctor.treatment.rate_factor == 0.25

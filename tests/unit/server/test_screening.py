"""The norm band: honest clients of any size stay, an update far beyond the others goes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.small_federations import Attack, Federation, Judged, Simulation
from fedserver.records import Adjustments, Exclusion, StoredUpdate
from fedserver.settings import ServerSettings
from fedserver.updates.screening import MAX_GROWTH, compared_rounds, outliers, screen, travel_of
from tests.factories import make_round, make_update

SETTINGS = ServerSettings(norm_band=10.0, epochs=2, batch_size=10, optimizer="sgd", momentum=0.0)


def stored(
    client_id: int, norm: float, *, registered: int | None = 10, num_steps: int = 2
) -> StoredUpdate:
    """Return an update of this norm; by default of 2 steps, which is all the order asks for."""
    return StoredUpdate(
        client_id=client_id,
        update=make_update(f"o{client_id}", num_steps=num_steps),
        delta_norm=norm,
        num_registered=registered,
    )


def cohort(norms: Sequence[float]) -> list[StoredUpdate]:
    """Return updates of clients 0, 1, ... with these norms."""
    return [stored(number, norm) for number, norm in enumerate(norms)]


def excluded(
    updates: Sequence[StoredUpdate],
    before: dict[int, list[StoredUpdate]] | None = None,
    *,
    round_number: int = 1,
    settings: ServerSettings = SETTINGS,
    model_norm: float = 0.0,
    trusted: Sequence[int] = (),
    factor: float = 1.0,
) -> list[Exclusion]:
    """Return what the screening of a round excludes."""
    closed = replace(
        make_round(round_number=round_number), adjustments=Adjustments(norm_band_factor=factor)
    )
    return screen(
        closed,
        updates,
        before=before or {},
        settings=settings,
        model_norm=model_norm,
        trusted=trusted,
    )


def ids(exclusions: Sequence[Exclusion]) -> list[int]:
    """Return whose updates were excluded."""
    return [exclusion.client_id for exclusion in exclusions]


def test_an_update_too_long_beside_the_others_is_excluded_with_its_evidence() -> None:
    """Norm, median of the others, width and bound are the evidence, in words and as numbers."""
    (exclusion,) = excluded(cohort([1.0, 1.1, 0.9, 1.2, 30.0]))
    assert exclusion.client_id == 4
    # Of four others the median is 1.05; ten times as wide for four is 10 (1 + 3 / 4).
    assert exclusion.refusal.evidence == {
        "kind": "norm-band",
        "norm": 30.0,
        "typical": pytest.approx(1.05),
        "width": 17.5,
        "bound": pytest.approx(17.5 * 1.05),
        "compared": 4,
    }
    for shown in ("30 away", "1.05 is usual", "17.5 times", "18.375"):
        assert shown in exclusion.refusal.reason
    assert exclusion.event.is_incident


@pytest.mark.parametrize(
    ("norms", "who"),
    [
        # The width is 10 (1 + 3 / others): 20 for three, 12 for fifteen.
        ([1.0, 1.0, 1.0, 21.0], [3]),
        ([1.0, 1.0, 1.0, 19.0], []),
        ([*[1.0] * 15, 12.1], [15]),
        ([*[1.0] * 15, 11.9], []),
        # Of three nobody can say which is the odd one.
        ([1.0, 1.0, 1e6], []),
        # Most others changed nothing: that is no measure.
        ([0.0, 0.0, 0.0, 1.0], []),
        # Nothing is wrong with a short update.
        ([1.0, 1.0, 1.0, 1.0, 0.0], []),
        # As long as most others are honest, colluders don't hide each other.
        ([1.0, 1.0, 1.0, 1.0, 40.0, 40.0, 40.0], [4, 5, 6]),
    ],
)
def test_the_band_is_wide_where_there_are_few(norms: list[float], who: list[int]) -> None:
    assert ids(excluded(cohort(norms))) == who


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"settings": SETTINGS.model_copy(update={"norm_band": 0.0})}, []),
        ({"trusted": [4]}, []),
        ({"model_norm": 2500.0}, [4]),
        # It moves the model by less than a hundredth.
        ({"model_norm": 3001.0}, []),
    ],
)
def test_who_is_trusted_or_harmless_stays_and_a_band_of_0_is_none(
    changes: dict[str, Any], who: list[int]
) -> None:
    assert ids(excluded(cohort([1.0, 1.0, 1.0, 1.0, 30.0]), **changes)) == who


@pytest.mark.parametrize(
    ("registered", "num_steps", "norm", "who"),
    [
        # 100 times the examples take 200 steps instead of 2: 17.5 times 100 is the bound.
        (1000, 200, 1700.0, []),
        (1000, 200, 1800.0, [4]),
        # More than MAX_GROWTH gains nothing.
        (100_000, 20_000, 1800.0, [4]),
        # The claim to have taken more steps than the order asks for gains nothing.
        (10, 200, 18.0, [4]),
        # The claim to have taken fewer only shortens what is allowed.
        (1000, 20, 170.0, []),
        (1000, 20, 180.0, [4]),
        # Less work than the others isn't held against a client: a single step may be long.
        (1, 2, 17.0, []),
        (1, 2, 18.0, [4]),
        # An order of an older version: the update's own number is all there is.
        (None, 2, 17.0, []),
    ],
)
def test_a_norm_is_judged_by_the_work_that_the_server_can_bound(
    registered: int | None, num_steps: int, norm: float, who: list[int]
) -> None:
    judged = stored(4, norm, registered=registered, num_steps=num_steps)
    assert ids(excluded([*cohort([1.0] * 4), judged])) == who


def test_travel_is_how_far_equal_gradients_reach() -> None:
    """Against the sum over the steps; Adam's steps are all as long."""
    for momentum in (0.0, 0.5, 0.9):
        velocity = travel = 0.0
        for steps in range(1, 40):
            velocity = momentum * velocity + 1
            travel += velocity
            update = stored(0, 1.0, registered=1000, num_steps=steps)
            settings = SETTINGS.model_copy(update={"momentum": momentum})
            assert travel_of(update, settings) == pytest.approx(travel)
            assert travel_of(update, settings.model_copy(update={"optimizer": "adam"})) == steps
    assert MAX_GROWTH == 100


def test_a_client_that_is_alone_against_others_who_agree_stays() -> None:
    """What was usual in round 2, a landmark, may be sent for ever, and five times that."""
    calm = cohort([0.01] * 20)
    history = {1: cohort([0.5] * 20), 2: cohort([1.0] * 20), **dict.fromkeys(range(3, 50), calm)}
    alone = [*calm[:-1], stored(19, 4.9)]
    assert excluded(alone, history, round_number=50) == []
    # 5 (1 + 3 / 19) times the median of the other nineteen of round 2.
    (exclusion,) = excluded([*calm[:-1], stored(19, 5.9)], history, round_number=50)
    assert exclusion.refusal.evidence["bound"] == pytest.approx(5 * (1 + 3 / 19))


def test_a_cohort_that_happens_to_be_calm_is_judged_by_the_last_rounds_too() -> None:
    """Also where it has too few clients for a median of its own, as a small buffer has."""
    history = {number: cohort([1.0] * 6) for number in range(3, 8)}
    few = [stored(0, 0.01), stored(1, 10.5)]
    assert excluded(few, history, round_number=8) == []
    assert ids(excluded([stored(0, 0.01), stored(1, 12.0)], history, round_number=8)) == [1]
    # No median rests on fewer than three other clients, however many updates they sent.
    alike = {number: cohort([1.0] * 3) for number in range(3, 8)}
    assert excluded([stored(0, 1.0), stored(1, 1e6)], alike, round_number=8) == []


def test_which_rounds_are_compared() -> None:
    """The last five, or back to the oldest order, and the powers of two."""
    assert compared_rounds(1, []) == []
    assert compared_rounds(4, []) == [1, 2, 3]
    assert compared_rounds(100, []) == [1, 2, 4, 8, 16, 32, 64, 95, 96, 97, 98, 99]
    late = replace(stored(0, 1.0), staleness=8)
    assert compared_rounds(17, [late]) == [1, 2, 4, 8, *range(9, 17)]


def test_a_repeated_round_has_half_the_band() -> None:
    norms = cohort([1.0, 1.0, 1.0, 1.0, 12.0])
    assert (ids(excluded(norms)), ids(excluded(norms, factor=0.5))) == ([], [4])


@given(
    norms=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12),
    registered=st.lists(st.integers(1, 10_000), min_size=12, max_size=12),
    past=st.lists(st.floats(0, 1e6, width=32), max_size=8),
)
def test_the_short_way_excludes_whom_the_plain_rule_does(
    norms: list[float], registered: list[int], past: list[float]
) -> None:
    """Against the rule written out, without the shortcut; beside each other at most half are."""
    updates = [
        stored(number, norm, registered=size, num_steps=10_000)
        for number, (norm, size) in enumerate(zip(norms, registered, strict=False))
    ]
    history = {1: cohort(past)}
    expected = []
    for update in updates:
        bounds = []
        for group, width in ((updates, 10), (history[1], 10), (history[1], 5)):
            allowed = [
                each.delta_norm
                * min(
                    MAX_GROWTH,
                    max(1.0, travel_of(update, SETTINGS) / travel_of(each, SETTINGS)),
                )
                for each in group
                if each.client_id != update.client_id
            ]
            if len(allowed) >= 3 and np.median(allowed):
                bounds.append(width * (1 + 3 / len(allowed)) * np.median(allowed))
        if bounds and update.delta_norm > max(bounds):
            expected.append(update.client_id)
    odd = outliers(updates, history, round_number=2, settings=SETTINGS, width=10, model_norm=0.0)
    assert [outlier.update.client_id for outlier in odd] == expected
    # What earlier rounds allow may be less than every update of a small round.
    beside = outliers(updates, {}, round_number=2, settings=SETTINGS, width=10, model_norm=0.0)
    assert 2 * len(beside) <= len(updates)


def played(
    federation: Federation, folder: Path, *, num_rounds: int, attack: Attack | None = None
) -> list[Judged]:
    """Play a federation in this process; returns what was judged."""
    simulation = Simulation(federation, folder, seed=7, num_rounds=num_rounds, attack=attack)
    return [update for of_round in simulation.play() for update in of_round]


def test_a_client_with_twenty_times_the_data_counts_in_every_round(tmp_path: Path) -> None:
    """Four clients with 16 digits and one with 320: its data are most of what can be learned."""
    federation = Federation(
        name="one large", num_clients=5, smallest=16, ratio=20, is_one_large=True
    )
    judged = played(federation, tmp_path, num_rounds=5)
    assert len(judged) == 25
    assert not any(update.is_excluded or update.is_beyond_half for update in judged)


def test_four_clients_alike_lose_nobody_in_many_rounds(tmp_path: Path) -> None:
    federation = Federation(name="alike", num_clients=4, task="synthetic", smallest=20)
    judged = played(federation, tmp_path, num_rounds=30)
    assert len(judged) == 120
    assert not any(update.is_excluded or update.is_beyond_half for update in judged)


@pytest.mark.parametrize(("claim", "is_caught"), [(1, True), (100, False)])
def test_an_update_scaled_by_30_is_excluded_unless_its_client_registered_for_it(
    tmp_path: Path, claim: int, is_caught: bool
) -> None:
    """As docs/strategies.md says; and nobody honest is excluded beside it."""
    attack = Attack(share=0, change=lambda _, own, __: own * 30, claim=claim)
    federation = Federation(name="alike", num_clients=5, smallest=20, settings={"epochs": 1})
    judged = played(federation, tmp_path, num_rounds=3, attack=attack)
    assert not any(update.is_excluded for update in judged if not update.is_attack)
    assert {update.is_excluded for update in judged if update.is_attack} == {is_caught}

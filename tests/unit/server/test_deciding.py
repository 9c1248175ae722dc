"""What the diagnoses of an attempt's clients change, once the attempt has ended."""

import asyncio
from pathlib import Path
from typing import Any

from fedrounds.diagnosis.values import Cause
from fedrounds.types import Counters, Incident, IncidentKind, RunFailure
from fedserver.records import Attempt
from fedserver.rounds.deciding import Decision, decide_after
from tests.factories import make_diagnosis
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


async def report(server: ServerRun, *client_ids: int, cause: Cause) -> None:
    """Let clients report a diagnosis with this cause of their orders."""
    origin = make_diagnosis().origin
    incident = Incident(
        kind=IncidentKind.TRAINING_DIAGNOSED,
        step=1,
        epoch=1,
        diagnosis=make_diagnosis(cause=cause, origin=origin),
    )
    for client_id in client_ids:
        await server.client_api.report_progress(
            server.session_ids[client_id],
            server.order_of(client_id).order_id,
            counters=Counters(),
            incidents=[(1, incident)],
            gave_up=False,
        )


async def decide(server: ServerRun, ending: Attempt, **changes: bool) -> Decision:
    """Return what is decided when this attempt fails."""
    flags = {"is_done": False, "is_base_shared": True} | changes
    return await decide_after(server.context, ending, store=server.recording, **flags)


def test_what_two_clients_agree_on_is_an_incident_and_changes_the_next_attempt(
    tmp_path: Path,
) -> None:
    """The event names them; what one client alone reports changes nothing."""

    async def agree(server: ServerRun) -> None:
        current, _ = await server.begin(0, 1)
        await report(server, 0, cause=Cause.LEARNING_RATE)
        alone = await decide(server, current)
        assert (alone.adjustments, alone.events) == (current.adjustments, [])
        await report(server, 1, cause=Cause.LEARNING_RATE)
        decision = await decide(server, current)
        assert decision.adjustments.lr_factor == 0.5
        (event,) = decision.events
        assert (event.kind, event.is_incident) == ("cause-shared", True)
        assert event.fields == {
            "cause": "learning-rate",
            "clients": [0, 1],
            "answers": 2,
            "change": "rate times 0.5 from the next attempt on",
        }
        assert not decision.is_base_blamed

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(agree(server))


def test_clients_that_agree_on_a_bad_base_take_it_back(tmp_path: Path) -> None:
    """Unless the attempt made a model all the same, or its clients were sent different models."""

    async def blame(server: ServerRun) -> None:
        _, current = await server.finish_first_round(0, 1)
        await report(server, 0, 1, cause=Cause.RECEIVED_MODEL)
        decision = await decide(server, current)
        assert decision.is_base_blamed
        (event,) = decision.events
        assert event.fields["change"] == "the model is taken back, its round repeated"
        assert not (await decide(server, current, is_done=True)).is_base_blamed
        assert not (await decide(server, current, is_base_shared=False)).is_base_blamed
        # The closer hands it on: the loop takes the round back.
        assert not server.evaluations.has_news
        await server.closer.fail(current, "why", failure=RunFailure.TOO_FEW_UPDATES)
        bad = await server.evaluations.take_bad_round(server.run.run_id)
        assert bad is not None
        assert bad.round_number == 1

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(blame(server))


def test_the_first_model_stands_and_so_does_a_model_taken_back_as_often_as_allowed(
    tmp_path: Path,
) -> None:
    """There is none before it; --max-rollbacks says how often a round is repeated."""

    async def blame(server: ServerRun, current: Attempt) -> bool:
        await report(server, 0, 1, cause=Cause.RECEIVED_MODEL)
        return (await decide(server, current)).is_base_blamed

    with serving(tmp_path / "first", **SETTINGS) as server:
        current, _ = asyncio.run(server.begin(0, 1))
        assert not asyncio.run(blame(server, current))
    with serving(tmp_path / "second", max_rollbacks=0, **SETTINGS) as server:
        _, current = asyncio.run(server.finish_first_round(0, 1))
        assert not asyncio.run(blame(server, current))


def test_an_aggregate_that_was_not_finite_halves_the_rate(tmp_path: Path) -> None:
    """Whatever clients report."""
    with serving(tmp_path, **SETTINGS) as server:
        current, _ = asyncio.run(server.begin(0, 1))
        decision = asyncio.run(decide(server, current, is_model_bad=True))
        assert decision.adjustments.lr_factor == 0.5
        assert asyncio.run(decide(server, current)).adjustments.lr_factor == 1

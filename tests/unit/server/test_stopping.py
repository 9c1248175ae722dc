"""A run that stops before its last round: by which evaluations, and what becomes of the rest."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedrounds.types import OrderEnd
from fedserver.models.stopping import early_stop
from fedserver.phases import OrderState, Phase
from fedserver.records import ModelEvaluation, RunState
from fedserver.settings import ServerSettings
from fedserver.verification.chain import finished_rounds
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 1, "min_updates": 1, "rounds": 5}


def evaluated(*losses: float | None) -> dict[int, ModelEvaluation]:
    """Return the evaluations of the rounds from 1 on; f1 is 1 - loss."""
    return {
        number: ModelEvaluation(
            accuracy=None, loss=loss, metrics={"f1": None if loss is None else 1 - loss}
        )
        for number, loss in enumerate(losses, start=1)
    }


@pytest.mark.parametrize(
    ("settings", "losses", "stops_after"),
    [
        ({}, (0.5, 0.1, 0.9), None),
        ({"stop_when": "loss<0.2"}, (0.5, 0.1, 0.05), 2),
        ({"stop_when": "f1>0.9"}, (0.5, 0.1), None),
        ({"stop_when": "f1>0.85"}, (0.5, None, 0.1), 3),
        # A tie isn't better; each better model begins the count anew.
        ({"patience": 2}, (0.5, 0.5, 0.4, 0.4, 0.6, 0.1), 5),
        ({"patience": 2, "best_by": "f1:max"}, (0.5, 0.5, 0.4, 0.4, 0.6), 5),
        ({"patience": 2, "best_by": "f1:min"}, (0.1, 0.2, 0.3, 0.4), None),
        ({"patience": 1}, (None, None, None), None),
        ({"patience": 3, "stop_when": "loss<0.45"}, (0.5, 0.5, 0.4, 0.4), 3),
    ],
)
def test_a_run_stops_at_the_first_round_that_its_settings_name(
    settings: dict[str, Any], losses: tuple[float | None, ...], stops_after: int | None
) -> None:
    stop = early_stop(ServerSettings(**settings), evaluated(*losses))
    assert (stop and stop.round_number) == stops_after


def test_the_reason_names_numbers_and_setting() -> None:
    by_bound = early_stop(ServerSettings(stop_when="f1>0.85"), evaluated(0.125))
    assert by_bound is not None
    assert by_bound.reason == "f1 0.875 of round 1 passes --stop-when f1>0.85"
    by_patience = early_stop(ServerSettings(patience=2), evaluated(0.5, 0.75, 0.6))
    assert by_patience is not None
    assert by_patience.reason == (
        "no model was better by loss:min than that of round 1 (0.5) for 2 rounds (--patience 2)"
    )


def check_stopped(server: ServerRun, digest: str) -> None:
    """Check that the run has stopped with the model of round 1, and round 2 was abandoned."""
    rounds = server.store.rounds
    done = rounds.last_done_round(server.run.run_id)
    assert done is not None
    assert (done.round_number, done.model_digest) == (1, digest)
    assert rounds.phases_of(server.run.run_id, 2) == [Phase.ABANDONED]
    stopped = server.coordinator.stopped
    assert stopped is not None
    assert stopped.round_number == 1
    assert finished_rounds(server.store.ledger.read_ledger(server.run.run_id)) == [1]


def test_a_run_that_is_good_enough_ends_with_that_model(tmp_path: Path) -> None:
    """Round 2 is open by then: its order ends as nobody's fault. Ended, the run says why."""

    async def stop(server: ServerRun) -> None:
        server.session_ids[0] = await server.register(0)
        completing = asyncio.create_task(server.coordinator.complete())
        await server.answer(0)
        digest = await completing
        check_stopped(server, digest)
        assert server.store.orders.stored_updates(server.latest()) == []
        abandoned = server.latest().orders[0]
        record = server.store.orders.find_order(abandoned.order_id)
        assert record.state is OrderState.ABANDONED
        assert server.store.orders.find_order_end(abandoned.order_id) is OrderEnd.RUN_STOPPED
        assert server.open_orders.list_all() == []
        await server.coordinator.end()
        (ended,) = [event for event in server.events if event.kind == "run-finished"]
        assert ended.fields["stopped_after"] == 1
        assert "passes --stop-when loss<1000" in str(ended.fields["reason"])
        assert not any(event.is_incident for event in server.events)
        run = server.store.runs.latest_run()
        assert run is not None
        assert run.state is RunState.FINISHED

    with serving(tmp_path, stop_when="loss<1000", **SETTINGS) as server:
        asyncio.run(stop(server))


@pytest.mark.parametrize("has_abandoned", [False, True])
def test_a_server_that_starts_again_stops_at_the_same_round(
    tmp_path: Path, has_abandoned: bool
) -> None:
    """Killed before round 2 was abandoned, or after it and before the run's end was recorded."""

    async def begin(server: ServerRun) -> None:
        _, following = await server.finish_first_round(0)
        assert following.round_number == 2
        if has_abandoned:
            assert await server.coordinator.complete()

    async def go_on(server: ServerRun) -> None:
        check_stopped(server, await server.coordinator.complete())

    settings = {"stop_when": "loss<1000", **SETTINGS}
    with serving(tmp_path, **settings) as server:
        asyncio.run(begin(server))
    with serving(tmp_path, **settings) as server:
        asyncio.run(go_on(server))

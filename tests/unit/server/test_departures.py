"""Clients that say goodbye: whose orders end, whose are awaited, and who is in a session then."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedrounds.errors import UnknownSession
from fedrounds.types import Leave, LeaveReason
from fedserver.clients.departures import stop_expecting
from fedserver.phases import OrderState
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


async def begin(server: ServerRun) -> str:
    """Begin a round with clients 0 and 1 in one session and client 2 in another."""
    session_id = await server.register(0, 1)
    server.session_ids |= {0: session_id, 1: session_id, 2: await server.register(2)}
    await server.go_on()
    server.events.clear()
    return session_id


def test_an_order_ends_with_its_clients_departure(tmp_path: Path) -> None:
    """It isn't called stalled, and the client isn't suspended; the others stay."""

    async def leave(server: ServerRun) -> None:
        session_id = await begin(server)
        order_id = server.order_of(0).order_id
        request = Leave(reason=LeaveReason.GAVE_UP, client_ids=(0,))
        await server.client_api.leave(session_id, request)
        assert server.store.orders.find_order(order_id).state is OrderState.ABANDONED
        assert server.open_orders.find(order_id) is None
        assert server.store.quarantine.suspensions(server.run.run_id) == {}
        (left,) = server.events
        assert (left.kind, left.client_id, left.fields) == ("client-left", 0, {"reason": "gave-up"})
        assert server.sessions.ready_clients(only_live=False) == {1, 2}
        sessions = {
            session.client_ids for session in server.store.runs.load_sessions(server.run.run_id)
        }
        assert sessions == {(1,), (2,)}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(leave(server))


def test_a_session_all_of_whose_clients_leave_is_over(tmp_path: Path) -> None:
    """Its next call is to register again; without orders one event names them all."""

    async def leave(server: ServerRun) -> None:
        session_id = await begin(server)
        for client_id in (0, 1):
            await server.answer(client_id)
        server.events.clear()
        await server.client_api.leave(session_id, Leave(reason=LeaveReason.STOPPED))
        (left,) = server.events
        assert (left.client_id, left.fields) == (None, {"clients": [0, 1], "reason": "stopped"})
        with pytest.raises(UnknownSession):
            await server.client_api.pull_work(session_id, wait_s=0)
        assert [
            session.client_ids for session in server.store.runs.load_sessions(server.run.run_id)
        ] == [(2,)]

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(leave(server))


def test_an_order_whose_client_will_be_back_or_has_its_update_is_awaited(tmp_path: Path) -> None:
    """The client counts as gone meanwhile, and its order stays open."""

    async def leave(server: ServerRun) -> None:
        session_id = await begin(server)
        kept = server.order_of(0).order_id
        request = Leave(reason=LeaveReason.STOPPED, kept_order_ids=(kept,))
        await server.client_api.leave(session_id, request)
        assert server.states(server.latest()) == {0: "OPEN", 1: "ABANDONED", 2: "OPEN"}
        request = Leave(reason=LeaveReason.STOPPED, coming_back=True)
        await server.client_api.leave(server.session_ids[2], request)
        assert server.states(server.latest())[2] == "OPEN"
        assert server.events[-1].fields == {"reason": "stopped", "coming_back": True}
        assert server.sessions.ready_clients(only_live=True) == set()
        assert server.sessions.ready_clients(only_live=False) == {0, 2}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(leave(server))


@pytest.mark.parametrize(
    ("reason", "state"), [(LeaveReason.STOPPED, "OPEN"), (LeaveReason.GAVE_UP, "ABANDONED")]
)
def test_a_run_that_requires_all_waits_for_who_was_stopped(
    tmp_path: Path, reason: LeaveReason, state: str
) -> None:
    """However long; not for a client that gave up for good."""

    async def leave(server: ServerRun) -> None:
        await begin(server)
        await server.client_api.leave(server.session_ids[2], Leave(reason=reason))
        assert server.states(server.latest())[2] == state
        assert (2 in server.sessions.ready_clients(only_live=False)) == (state == "OPEN")

    with serving(tmp_path, require_all=True, **SETTINGS) as server:
        asyncio.run(leave(server))


def test_a_client_that_does_not_come_back_is_expected_no_more(tmp_path: Path) -> None:
    """Its order ends, and its session."""

    async def leave(server: ServerRun) -> None:
        await begin(server)
        request = Leave(reason=LeaveReason.STOPPED, coming_back=True)
        await server.client_api.leave(server.session_ids[2], request)
        order = server.open_orders.find(server.order_of(2).order_id)
        assert order is not None
        await stop_expecting(
            order,
            61.0,
            run_id=server.run.run_id,
            sessions=server.sessions,
            open_orders=server.open_orders,
            store=server.recording,
        )
        assert server.states(server.latest())[2] == "ABANDONED"
        assert server.events[-1].fields == {"reason": "did not come back", "away_s": 61.0}
        assert [
            session.client_ids for session in server.store.runs.load_sessions(server.run.run_id)
        ] == [(0, 1)]

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(leave(server))

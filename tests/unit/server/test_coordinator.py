"""The round loop: a whole run, its end, and the errors of the disk that it waits out."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fedrounds.errors import OutOfSpace, RunFailed, StorageUnusable
from fedserver.phases import Phase
from fedserver.records import Attempt, RunState
from tests.server_run import ServerRun, serving

# A tick is a quarter of the shortest of these.
QUICK: dict[str, Any] = {"stall_after": 0.2, "first_step": 3600, "lease": 3600}


async def run_with(server: ServerRun, *client_ids: int, **changes: Any) -> str:  # noqa: ANN401
    """Let clients answer every order until the run is complete; returns the last model's digest."""
    for client_id in client_ids:
        server.session_ids[client_id] = await server.register(client_id)

    async def keep_answering(client_id: int) -> None:
        while True:
            await server.answer(client_id, **changes)

    completing = asyncio.create_task(server.coordinator.complete())
    clients = [asyncio.create_task(keep_answering(client_id)) for client_id in client_ids]
    try:
        return await completing
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def phases_of(server: ServerRun, round_number: int) -> list[Phase]:
    """Return how the attempts at a round stand."""
    return server.store.rounds.phases_of(server.run.run_id, round_number)


def test_a_run_goes_round_by_round_to_its_last_model(tmp_path: Path) -> None:
    """Each is evaluated; a run that is over is FINISHED when somebody says so."""
    with serving(tmp_path, rounds=3, min_clients=2) as server:
        digest = asyncio.run(run_with(server, 0, 1))
        assert [phases_of(server, number) for number in (1, 2, 3)] == [[Phase.DONE]] * 3
        assert server.latest().model_digest == digest
        assert server.kinds_of_events().count("evaluated") == 3
        asyncio.run(server.coordinator.end())
        run = server.store.runs.latest_run()
        assert run is not None
        assert run.state is RunState.FINISHED


def test_a_run_fails_with_the_reason_of_its_last_attempt(tmp_path: Path) -> None:
    """After --max-attempts attempts at one round."""
    with serving(tmp_path, rounds=3, min_clients=1, max_attempts=2) as server:
        with pytest.raises(RunFailed, match=r"^round 1 failed 2 times, .* num_examples is 0"):
            asyncio.run(run_with(server, 0, num_examples=0))
        assert phases_of(server, 1) == [Phase.FAILED] * 2
        run = server.store.runs.latest_run()
        assert run is not None
        assert run.state is RunState.FAILED


def test_a_run_that_refused_clients_end_says_how_to_go_on_without_them(tmp_path: Path) -> None:
    """Two updates are needed of two clients, both refused: a smaller --min-updates would do."""
    with (
        serving(tmp_path, rounds=1, min_clients=2, max_attempts=1) as server,
        pytest.raises(RunFailed, match=r"without them, or with --min-updates below 2\. See more"),
    ):
        asyncio.run(run_with(server, 0, 1, num_examples=0))


def test_a_start_of_a_run_that_had_begun_is_recorded(tmp_path: Path) -> None:
    """Not the first start; a run that was complete gives its model at once."""
    with serving(tmp_path, rounds=1, min_clients=1) as server:
        digest = asyncio.run(run_with(server, 0))
        assert "server-restarted" not in server.kinds_of_events()
    with serving(tmp_path, rounds=1, min_clients=1) as server:
        assert asyncio.run(server.coordinator.complete()) == digest
        assert server.kinds_of_events() == ["server-restarted"]


def test_a_bad_model_is_taken_back_and_its_round_repeated(tmp_path: Path) -> None:
    """Round 2's loss explodes: its attempt ends ROLLED_BACK, round 3's ABANDONED."""
    with serving(tmp_path, rounds=3, min_clients=1, max_delta_norm=1e6) as server:

        async def run() -> str:
            server.session_ids[0] = await server.register(0)

            async def keep_answering() -> None:
                for shift in (0.001, 50.0):
                    await server.answer(0, shift=shift)
                while True:
                    await server.answer(0, shift=0.001)

            client = asyncio.create_task(keep_answering())
            try:
                return await server.coordinator.complete()
            finally:
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)

        digest = asyncio.run(run())
        assert phases_of(server, 2) == [Phase.ROLLED_BACK, Phase.DONE]
        assert server.latest().model_digest == digest
        (taken_back,) = [event for event in server.events if event.kind == "model-rolled-back"]
        assert taken_back.round_number == 2
        assert taken_back.fields["change"] == "rate times 0.5, norm band times 0.5"


def test_a_suspicion_that_is_not_borne_out_costs_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop leaves the wait, looks at the base, and collects the same attempt further."""

    async def run(server: ServerRun) -> str:
        server.session_ids[0] = await server.register(0)
        looks, take_bad_round = asyncio.Semaphore(0), server.evaluations.take_bad_round

        async def look(run_id: str) -> Attempt | None:
            looks.release()
            return await take_bad_round(run_id)

        monkeypatch.setattr(server.evaluations, "take_bad_round", look)
        completing = asyncio.create_task(server.coordinator.complete())
        await asyncio.wait_for(looks.acquire(), 60)
        server.evaluations.suspect_model()
        server.open_orders.round_changed.notify()
        await asyncio.wait_for(looks.acquire(), 60)
        assert phases_of(server, 1) == [Phase.COLLECTING]
        await server.answer(0)
        return await completing

    with serving(tmp_path, rounds=1, min_clients=1, **QUICK) as server:
        assert asyncio.run(run(server)) == server.latest().model_digest
        assert phases_of(server, 1) == [Phase.DONE]


def steps(*results: Exception | str) -> Callable[[], Awaitable[str]]:
    """Return a step that raises or returns these, one at each call."""
    left = iter(results)

    async def step() -> str:
        result = next(left)
        if isinstance(result, Exception):
            raise result
        return result

    return step


def test_a_step_that_the_disk_does_not_let_is_taken_again(tmp_path: Path) -> None:
    """A full disk, or a passing error of the operating system; each is on record once."""
    with serving(tmp_path, min_clients=1, **QUICK) as server:
        step = steps(OutOfSpace("full"), OSError(errno.EIO, "passing"), "done")
        assert asyncio.run(server.coordinator.with_room(step)) == "done"
        assert server.kinds_of_events() == ["disk-full", "server-failed"]


def test_a_step_that_no_time_mends_ends_the_server(tmp_path: Path) -> None:
    """A file that may not be used: a person must mend that, and the record says so."""
    with serving(tmp_path, min_clients=1, **QUICK) as server:
        step = steps(PermissionError(errno.EACCES, "denied", "models"), "not reached")
        with pytest.raises(StorageUnusable):
            asyncio.run(server.coordinator.with_room(step))
        assert server.kinds_of_events() == ["server-failed"]

"""The client API: what each call answers, whoever asks and whenever."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from fedrounds.diagnosis.values import Origin, StepPhase
from fedrounds.errors import (
    FederationError,
    InvalidInput,
    NotFound,
    OutOfFiles,
    OutOfSpace,
    ServerUnreachable,
    StateDirCopied,
    UnknownSession,
    WrongOffset,
    WrongSettings,
)
from fedrounds.types import (
    NO_COMPRESSION,
    Counters,
    Encoding,
    Incident,
    IncidentKind,
    OrderEnd,
    Registration,
    RunEnd,
    WorkState,
)
from fedrounds.wire.framing import unframe_download
from fedserver.phases import OrderState
from tests.factories import make_diagnosis, make_registration
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


async def report(server: ServerRun, client_id: int, **changes: Any) -> OrderEnd | None:  # noqa: ANN401
    """Report on a client's order; `changes` are of a report that says nothing new."""
    fields: dict[str, Any] = {"counters": Counters(), "incidents": [], "gave_up": False}
    order_id = changes.pop("order_id", None) or server.order_of(client_id).order_id
    session_id = server.session_ids[client_id]
    return await server.client_api.report_progress(session_id, order_id, **(fields | changes))


def test_a_session_is_durable_when_its_client_has_it(tmp_path: Path) -> None:
    """A server that starts again knows it; another task is refused with what to type."""
    with serving(tmp_path, **SETTINGS) as server:
        session_id = asyncio.run(server.register(0, 1))
        assert [
            session.session_id for session in server.store.runs.load_sessions(server.run.run_id)
        ] == [session_id]
        other = Registration(
            client_ids=(5,), instance_key="five", software_version="0", task="mnist-cnn"
        )
        with pytest.raises(WrongSettings, match="start it with --task tests"):
            asyncio.run(server.client_api.register(other))
        # With other ids the same instance opens another session, and the old session is gone.
        registration = make_registration(1, instance_key="instance-(0, 1)", num_examples=(9,))
        asyncio.run(server.client_api.register(registration))
        (session,) = server.store.runs.load_sessions(server.run.run_id)
        assert session.client_ids == (1,)


def test_copies_of_a_state_dir_are_one_incident(tmp_path: Path) -> None:
    """Both processes are refused; only the call that ended the session is recorded."""
    with serving(tmp_path, **SETTINGS) as server:

        async def register(key: str) -> None:
            await server.client_api.register(make_registration(3, 4, process_key=key))

        for key in ("a", "b", "a", "b"):
            asyncio.run(register(key))
        for key in ("a", "b"):
            with pytest.raises(StateDirCopied):
                asyncio.run(register(key))
        (copied,) = server.events
        assert (copied.kind, copied.client_id) == ("state-dir-copied", None)
        assert copied.fields == {"clients": [3, 4]}


@pytest.mark.parametrize(
    ("capabilities", "encoding"), [(("int8",), Encoding.INT8), ((), Encoding.STATE_DICT)]
)
def test_a_client_compresses_only_if_it_knows_how(
    tmp_path: Path, capabilities: tuple[str, ...], encoding: Encoding
) -> None:
    """An older client sends whole updates."""
    with serving(tmp_path, compression="int8", **SETTINGS) as server:
        registration = Registration(
            client_ids=(0,), instance_key="k", software_version="0", capabilities=capabilities
        )
        info = asyncio.run(server.client_api.register(registration))
        assert info.compression.encoding is encoding
    with serving(tmp_path / "plain", **SETTINGS) as server:
        info = asyncio.run(server.client_api.register(registration))
        assert info.compression == NO_COMPRESSION


def test_a_pull_gives_the_clients_order_again_and_again(tmp_path: Path) -> None:
    """Until it has ended; then it waits, and says for which round."""

    async def pull(server: ServerRun) -> None:
        await server.begin(0, 1)
        api, session_id = server.client_api, server.session_ids[0]
        first = await api.pull_work(session_id, wait_s=0)
        assert first.state is WorkState.ORDER
        assert await api.pull_work(session_id, wait_s=0) == first
        await server.answer(0)
        after = await api.pull_work(session_id, wait_s=0)
        assert after.state is WorkState.WAIT
        assert after.waiting is not None
        assert after.waiting.round_number == 1

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(pull(server))


def test_a_parked_pull_is_woken_by_the_round_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that is too early says how many clients are missing."""

    async def pull(server: ServerRun) -> None:
        server.session_ids[0] = await server.register(0)
        is_waiting, wait = asyncio.Event(), server.sessions.changed.wait

        async def note_and_wait(timeout_s: float) -> bool:
            is_waiting.set()
            return await wait(timeout_s)

        monkeypatch.setattr(server.sessions.changed, "wait", note_and_wait)
        opening = asyncio.create_task(server.resume())
        api = server.client_api
        await asyncio.wait_for(is_waiting.wait(), 60)
        early = await api.pull_work(server.session_ids[0], wait_s=0)
        assert early.waiting is not None
        assert (early.waiting.clients_here, early.waiting.clients_needed) == (1, 2)
        parked = asyncio.create_task(api.pull_work(server.session_ids[0], wait_s=20))
        await server.register(1)
        work = await parked
        assert work.order is not None
        assert work.order.client_id == 0
        await opening

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(pull(server))


def test_between_two_rounds_a_pull_says_nothing_of_any(tmp_path: Path) -> None:
    """There is none to wait for yet."""
    with serving(tmp_path, **SETTINGS) as server:
        session_id = asyncio.run(server.register(0))
        work = asyncio.run(server.client_api.pull_work(session_id, wait_s=0))
        assert work.waiting is not None
        assert (work.waiting.round_number, work.waiting.clients_needed) == (0, 0)


def test_parked_pulls_are_sent_away_when_the_server_stops(tmp_path: Path) -> None:
    """Their error says that it goes on later."""

    async def pull(server: ServerRun) -> None:
        session_id = await server.register(0)
        parked = asyncio.create_task(server.client_api.pull_work(session_id, wait_s=20))
        await asyncio.sleep(0)
        server.client_api.stop()
        with pytest.raises(ServerUnreachable, match="goes on when started again"):
            await parked

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(pull(server))


def test_the_end_of_a_run_waits_until_every_live_client_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For --farewell at most."""

    async def finish(server: ServerRun) -> None:
        session_id = await server.register(0)
        run_end = RunEnd(has_failed=False)
        looks, list_live = asyncio.Semaphore(0), server.sessions.live_sessions

        def look() -> set[str]:
            looks.release()
            return list_live()

        with monkeypatch.context() as patched:
            patched.setattr(server.sessions, "live_sessions", look)
            finishing = asyncio.create_task(server.client_api.finish(run_end))
            for _ in range(3):
                await asyncio.wait_for(looks.acquire(), 60)
        assert not finishing.done()
        work = await server.client_api.pull_work(session_id, wait_s=20)
        assert (work.state, work.run_end) == (WorkState.FINISHED, run_end)
        await asyncio.wait_for(finishing, 60)

    with serving(tmp_path, farewell=300, **SETTINGS) as server:
        asyncio.run(finish(server))

    async def nobody_asks(server: ServerRun) -> None:
        await server.register(0)
        await server.client_api.finish(RunEnd(has_failed=True))

    with serving(tmp_path / "patient", farewell=0, **SETTINGS) as server:
        asyncio.run(nobody_asks(server))


def test_a_download_is_progress_of_the_clients_order(tmp_path: Path) -> None:
    """From any byte on; a blob that isn't there, or a byte beyond it, is a sentence."""

    async def download(server: ServerRun) -> None:
        _, base = await server.begin(0, 1)
        order = server.open_orders.find(server.order_of(0).order_id)
        assert order is not None
        server.clock.now_s += 5
        received = bytearray()

        async def take(framed: bytes) -> None:
            received.extend(unframe_download(framed))

        api, session_id = server.client_api, server.session_ids[0]
        await api.download(session_id, base.digest, offset=10, write=take)
        assert bytes(received) == base.file.path.read_bytes()[10:]
        assert server.open_orders.idle_s(order) == 0
        with pytest.raises(NotFound):
            await api.download(session_id, "0" * 64, offset=0, write=take)
        with pytest.raises(WrongOffset):
            await api.download(session_id, base.digest, offset=1 << 40, write=take)

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(download(server))


def test_a_report_of_progress_keeps_an_order_alive(tmp_path: Path) -> None:
    """It goes on: no end to report. Another session's order is none of its business."""

    async def reports(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.open_orders.find(server.order_of(0).order_id)
        assert order is not None
        server.clock.now_s += 5
        assert await report(server, 0, counters=Counters(batches=1)) is None
        assert server.open_orders.idle_s(order) == 0
        with pytest.raises(NotFound, match="isn't one of this session's"):
            await report(server, 0, order_id=server.order_of(1).order_id)
        with pytest.raises(NotFound, match="there is no order"):
            await report(server, 0, order_id="unknown")
        with pytest.raises(UnknownSession):
            await server.client_api.pull_work("unknown", wait_s=0)

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(reports(server))


def test_an_order_that_was_given_up_has_ended(tmp_path: Path) -> None:
    """Its client learns that again and again; the event is recorded once."""

    async def reports(server: ServerRun) -> None:
        await server.begin(0, 1)
        order_id = server.order_of(0).order_id
        for _ in range(2):
            end = await report(server, 0, order_id=order_id, gave_up=True)
            assert end is OrderEnd.GIVEN_UP
        assert await report(server, 0, order_id=order_id) is OrderEnd.GIVEN_UP
        assert server.states(server.latest())[0] == OrderState.ABANDONED
        assert server.kinds_of_events().count("order-given-up") == 1

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(reports(server))


def test_an_incident_is_recorded_once_and_with_declared_names_alone(tmp_path: Path) -> None:
    """Whatever else a client sends, and however often."""

    async def reports(server: ServerRun) -> None:
        await server.begin(0, 1)
        incident = Incident(
            kind=IncidentKind.NON_FINITE_LOSS,
            step=3,
            epoch=1,
            tensor="my.secret",
            detail={"loss": float("nan"), "my-secret": 1.0},
        )
        for _ in range(2):
            assert await report(server, 0, incidents=[(1, incident)]) is None
        (event,) = [event for event in server.events if event.kind == "non-finite-loss"]
        assert (event.round_number, event.attempt, event.client_id) == (1, 1, 0)
        assert event.fields == {"loss": "nan", "step": 3, "epoch": 1}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(reports(server))


@pytest.mark.parametrize(
    ("module", "tensor", "words"),
    [("unknown", "", "names a module"), ("1", "unknown", "names a tensor"), ("1", "1.weight", "")],
)
def test_a_diagnosis_of_another_model_is_refused(
    tmp_path: Path, module: str, tensor: str, words: str
) -> None:
    """Nothing of it is noted: both sides need the same version of the task."""
    origin = Origin(phase=StepPhase.FORWARD, module=module, operation="linear", tensor=tensor)
    incident = Incident(
        kind=IncidentKind.TRAINING_DIAGNOSED,
        step=1,
        epoch=1,
        diagnosis=make_diagnosis(origin=origin),
    )

    async def reports(server: ServerRun) -> None:
        await server.begin(0, 1)
        if not words:
            assert await report(server, 0, incidents=[(1, incident)]) is None
            assert server.kinds_of_events()[-1] == "training-diagnosed"
            return
        with pytest.raises(InvalidInput, match=words):
            await report(server, 0, incidents=[(1, incident)])
        assert "training-diagnosed" not in server.kinds_of_events()

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(reports(server))


def test_an_error_that_is_a_clients_doing_reaches_the_client_and_is_no_event(
    tmp_path: Path,
) -> None:
    """Other errors are events; what nobody foresaw reaches no client as text."""

    async def answer(server: ServerRun, error: Exception) -> tuple[FederationError, list[str]]:
        server.events.clear()
        answered = await server.client_api.answer_for("PullWork", error)
        return answered, server.kinds_of_events()

    with serving(tmp_path, **SETTINGS) as server:
        mistake = InvalidInput("yours")
        assert asyncio.run(answer(server, mistake)) == (mistake, [])
        full = OutOfSpace("no room to write in /srv/s (database or disk is full); free some space")
        answered, kinds = asyncio.run(answer(server, full))
        assert (type(answered), kinds) == (OutOfSpace, ["disk-full"])
        assert str(answered).startswith("PullWork failed: the server is out of disk space")
        assert "/srv" not in str(answered)
        assert "database" not in str(answered)
        answered, kinds = asyncio.run(answer(server, OSError(errno.EMFILE, "too many open files")))
        assert (type(answered), kinds) == (OutOfFiles, ["out-of-files"])
        assert str(answered).startswith("PullWork failed: the server is out of files")
        answered, kinds = asyncio.run(answer(server, RuntimeError("our secret")))
        assert "our secret" not in str(answered)
        assert (type(answered), kinds) == (FederationError, ["server-failed"])

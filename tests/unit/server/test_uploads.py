"""Uploads: each answer, and what is on the disk and in the store when it is given."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrounds.errors import (
    CorruptPayload,
    InvalidInput,
    OutOfSpace,
    ServerUnreachable,
    StreamFenced,
    WrongOffset,
)
from fedrounds.strategies.server_step import control_layout
from fedrounds.tensors.codec import digest_bytes, encode_state
from fedrounds.types import Counters, Encoding, OrderEnd, Receipt, RunFailure, Section
from fedserver.api import uploads
from fedserver.phases import OrderState
from fedserver.records import HeldState
from fedserver.store import read_history
from tests.server_run import ServerRun, chunks_of, non_finite, serving, update_of

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


async def give_up(server: ServerRun, client_id: int) -> None:
    """Let a client give up its order."""
    await server.client_api.report_progress(
        server.session_ids[client_id],
        server.order_of(client_id).order_id,
        counters=Counters(),
        incidents=[],
        gave_up=True,
    )


def test_a_receipt_is_given_for_what_is_in_the_spool_and_in_the_store(tmp_path: Path) -> None:
    """With the norm of the delta; asked again, the bytes are known to be recorded."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        payload = server.payload_of(order)
        update = update_of(order, payload)
        answer = await server.upload(server.session_ids[0], order, payload)
        assert answer.receipt is Receipt.STORED
        assert server.spool.path(order.order_id, update.digest).read_bytes() == payload
        (stored,) = server.store.orders.stored_updates(server.latest())
        assert stored.update.digest == update.digest
        assert stored.delta_norm > 0
        committed = server.client_api.committed_bytes
        assert await committed(server.session_ids[0], order.order_id, update.digest) == (0, True)
        assert await committed(server.session_ids[0], order.order_id, "0" * 64) == (0, False)

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_update_is_durable_before_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its file can't be made durable, there is no receipt, and the order stays open."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)

        def fail(_: object) -> None:
            raise OutOfSpace("full")

        with monkeypatch.context() as patched:
            patched.setattr(server.spool, "make_durable", fail)
            with pytest.raises(OutOfSpace):
                await server.answer(0)
        assert server.store.orders.find_order(order.order_id).state is OrderState.OPEN

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_the_same_bytes_again_are_a_duplicate_and_others_are_refused(tmp_path: Path) -> None:
    """The first update stands; that another update came is on record once."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order, session_id = server.order_of(0), server.session_ids[0]
        payload = server.payload_of(order)
        other = server.payload_of(order, shift=0.02)
        assert (await server.upload(session_id, order, payload)).receipt is Receipt.STORED
        assert (await server.upload(session_id, order, payload)).receipt is Receipt.DUPLICATE
        for _ in range(2):
            refused = await server.upload(session_id, order, other)
            assert refused.receipt is Receipt.REFUSED
            assert refused.reason.endswith("has an update with other bytes; the first one stands")
        assert server.kinds_of_events().count("update-contradicted") == 1
        (stored,) = server.store.orders.stored_updates(server.latest())
        assert stored.update.digest == update_of(order, payload).digest

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_measurements_that_the_task_doesnt_have_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The update counts all the same; once its round is done, what came of the rest is recorded."""
    perfect = {"f1/tp": (4.0, 4.0, 4.0)} | {f"f1/{part}": (0.0,) * 3 for part in ("fp", "fn", "tn")}
    foreign = {"secret": (1.0,), "auc": (0.5, 0.5)}

    async def upload(server: ServerRun) -> None:
        opened, base = await server.begin(0, 1)
        metrics = {"global_accuracy": 1.0, "global_examples": 12.0}
        answer = await server.answer(0, metrics=metrics, measurements={**perfect, **foreign})
        assert answer.receipt is Receipt.STORED
        (stored,) = server.store.orders.stored_updates(opened)
        assert {n: tuple(v) for n, v in stored.update.measurements.items()} == perfect
        await server.closer.finish(await server.closer.close(opened), base)
        (first, *_) = read_history(server.store, server.run)
        assert first.client_evaluation is not None
        assert first.client_evaluation.metrics == {"f1": pytest.approx(1.0)}
        with closing(sqlite3.connect(tmp_path / "federation.sqlite")) as connection:
            assert connection.execute("SELECT measurements FROM updates").fetchall() == [(None,)]
        await server.evaluations.done()

    settings = {**SETTINGS, "task": "tests.tiny_task:measured", "evaluate_on_clients": True}
    with serving(tmp_path, **settings) as server:
        asyncio.run(upload(server))
    assert "2 measurements aren't those of this task's metrics" in caplog.text


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"num_examples": 0}, "weight"),
        ({"metrics": {"my-own-words": 1.0}}, "metrics"),
        ({"sections": (Section(name="my-own", digest="", size_bytes=1),)}, "sections"),
    ],
)
def test_an_update_with_a_bad_header_is_refused_before_any_byte(
    tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    """Its client is suspended, and no text of its own is kept."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        answer = await server.answer(0, **changes)
        assert answer.receipt is Receipt.REFUSED
        (held,) = server.store.quarantine.held_updates()
        assert (held.refusal.evidence["kind"], held.kept_bytes) == (kind, 0)
        assert list((tmp_path / "spool").iterdir()) == []
        assert list((tmp_path / "quarantine").iterdir()) == []
        assert list(server.store.quarantine.suspensions(server.run.run_id)) == [0]

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))
        with server.store.database.reading() as connection:
            row = connection.exec_driver_sql("SELECT metrics, sections FROM updates").one()
        assert "my-own" not in f"{row}"


def test_an_update_with_a_nan_is_refused_and_kept(tmp_path: Path) -> None:
    """Its bytes move into the quarantine, and its client asks no more."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        payload = non_finite(server.payload_of(order))
        answer = await server.upload(server.session_ids[0], order, payload)
        assert answer.receipt is Receipt.REFUSED
        assert "holds nan at element 0" in answer.reason
        (held,) = server.store.quarantine.held_updates()
        assert (held.state, held.verdict) == (HeldState.HELD, OrderState.REFUSED)
        assert server.quarantine.path(held.order_id, held.digest).read_bytes() == payload
        assert list((tmp_path / "spool").iterdir()) == []
        again = await server.upload(server.session_ids[0], order, payload)
        assert (again.receipt, again.reason) == (Receipt.REFUSED, answer.reason)

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_bytes_that_are_no_model_are_refused(tmp_path: Path) -> None:
    """Whatever a reader says of them is the reason."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        answer = await server.upload(
            server.session_ids[0], server.order_of(0), b"no safetensors at all"
        )
        assert answer.receipt is Receipt.REFUSED
        (held,) = server.store.quarantine.held_updates()
        assert held.refusal.evidence == {"kind": "malformed"}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_bytes_that_do_not_match_their_digest_are_dropped(tmp_path: Path) -> None:
    """The client sends them again from byte 0; the order stays open."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order, session_id = server.order_of(0), server.session_ids[0]
        payload = server.payload_of(order)
        damaged = payload[:-1] + bytes([payload[-1] ^ 1])
        upload = server.client_api.upload
        with pytest.raises(CorruptPayload, match="from byte 0"):
            await upload(session_id, update_of(order, payload), chunks_of(damaged), offset=0)
        assert list((tmp_path / "spool").iterdir()) == []
        assert (await server.upload(session_id, order, payload)).receipt is Receipt.STORED

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_upload_goes_on_at_the_committed_byte(tmp_path: Path) -> None:
    """A stream that ends early leaves its bytes; more than the header says is refused."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order, session_id = server.order_of(0), server.session_ids[0]
        payload = server.payload_of(order)
        update, api = update_of(order, payload), server.client_api
        with pytest.raises(ServerUnreachable, match="the stream ended at byte 100 of"):
            await api.upload(session_id, update, chunks_of(payload[:100]), offset=0)
        assert await api.committed_bytes(session_id, order.order_id, update.digest) == (100, False)
        with pytest.raises(WrongOffset, match="100 bytes are committed"):
            await api.upload(session_id, update, chunks_of(payload), offset=0)
        with pytest.raises(InvalidInput, match="the stream holds more than"):
            await api.upload(session_id, update, chunks_of(payload), offset=100)
        # Empty chunks are no progress and no end.
        rest = chunks_of(b"", payload[100:], b"")
        answer = await api.upload(session_id, update, rest, offset=100)
        assert answer.receipt is Receipt.STORED

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


async def silent() -> AsyncIterator[memoryview]:
    """Yield one byte, then nothing for ever."""
    yield memoryview(b"x")
    await asyncio.Event().wait()


def test_a_stream_nothing_comes_from_is_sent_away(tmp_path: Path) -> None:
    """After --stall-after, so that others get its slot."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        update = update_of(order, server.payload_of(order))
        with pytest.raises(ServerUnreachable, match=r"nothing came for 0\.2 s; 1 bytes are there"):
            await server.client_api.upload(server.session_ids[0], update, silent(), offset=0)

    with serving(tmp_path, stall_after=0.2, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_a_newer_stream_takes_an_upload_over(tmp_path: Path) -> None:
    """The older one ends; the newer one goes on at the committed byte."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order, session_id = server.order_of(0), server.session_ids[0]
        payload = server.payload_of(order)
        update, api = update_of(order, payload), server.client_api
        has_begun = asyncio.Event()

        async def first_bytes() -> AsyncIterator[memoryview]:
            yield memoryview(payload[:10])
            has_begun.set()
            await asyncio.Event().wait()

        older = asyncio.create_task(api.upload(session_id, update, first_bytes(), offset=0))
        await has_begun.wait()
        answer = await api.upload(session_id, update, chunks_of(payload[10:]), offset=10)
        assert answer.receipt is Receipt.STORED
        with pytest.raises(StreamFenced):
            await older

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_update_that_comes_after_its_round_is_late(tmp_path: Path) -> None:
    """Its answer says how its order ended; it is on record once, and no byte is kept."""

    async def upload(server: ServerRun) -> None:
        opened, _ = await server.begin(0, 1)
        order, payload = server.order_of(1), server.payload_of(server.order_of(1))
        await server.answer(0)
        await server.closer.close(opened)
        for _ in range(2):
            answer = await server.upload(server.session_ids[1], order, payload)
            assert answer.receipt is Receipt.LATE
            assert answer.order_end is OrderEnd.ROUND_CLOSED
        assert server.kinds_of_events().count("update-late") == 1
        assert server.store.orders.find_order(order.order_id).digest is not None

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_order_that_ends_while_its_update_comes_is_answered_as_it_ended(tmp_path: Path) -> None:
    """The next bytes aren't taken any more."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        payload = server.payload_of(order)

        async def chunks() -> AsyncIterator[memoryview]:
            yield memoryview(payload[:10])
            await give_up(server, 0)
            yield memoryview(payload[10:])

        answer = await server.client_api.upload(
            server.session_ids[0], update_of(order, payload), chunks(), offset=0
        )
        assert (answer.receipt, answer.order_end) == (Receipt.LATE, OrderEnd.GIVEN_UP)
        (left,) = (tmp_path / "spool").iterdir()
        assert left.stat().st_size == 10

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_update_waits_at_the_moment_between_two_rounds(tmp_path: Path) -> None:
    """The store has its order open, memory doesn't yet: the client tries again."""

    async def upload(server: ServerRun) -> None:
        opened, _ = await server.begin(0, 1)
        order, payload = server.order_of(0), server.payload_of(server.order_of(0))
        server.open_orders.abandon_round(opened)
        with pytest.raises(ServerUnreachable, match="the round is changing; try again"):
            await server.upload(server.session_ids[0], order, payload)

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def held_up(server: ServerRun, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that is set once an order's client has waited for the server."""
    is_noted, note_waiting = asyncio.Event(), server.open_orders.note_waiting

    def note(order_id: str) -> None:
        note_waiting(order_id)
        is_noted.set()

    monkeypatch.setattr(server.open_orders, "note_waiting", note)
    return is_noted


def test_an_update_that_finds_the_buffer_full_comes_into_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client waits for the receipt, and isn't late meanwhile."""

    async def upload(server: ServerRun) -> None:
        opened, base = await server.begin(0, 1)
        await server.answer(0)
        is_held_up = held_up(server, monkeypatch)
        waiting = asyncio.create_task(server.answer(1))
        await is_held_up.wait()
        closed = await server.closer.close(opened)
        following, _ = await server.closer.finish(closed, base)
        assert (await waiting).receipt is Receipt.STORED
        (stored,) = server.store.orders.stored_updates(following)
        assert (stored.client_id, stored.staleness) == (1, 1)
        await server.evaluations.done()

    with serving(
        tmp_path, strategy="fedbuff", strategy_parameters={"buffer_size": 1}, min_clients=2
    ) as server:
        asyncio.run(upload(server))


def test_an_update_for_an_attempt_that_failed_is_not_needed(tmp_path: Path) -> None:
    """Nothing is held against its client: it was in time."""

    async def upload(server: ServerRun) -> None:
        opened, _ = await server.begin(0, 1)
        order, payload = server.order_of(0), server.payload_of(server.order_of(0))
        await server.closer.fail(opened, "why", failure=RunFailure.TOO_FEW_UPDATES)
        answer = await server.upload(server.session_ids[0], order, payload)
        assert (answer.receipt, answer.order_end) == (Receipt.LATE, OrderEnd.ATTEMPT_FAILED)
        assert server.kinds_of_events()[-1] == "update-unneeded"

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_update_whose_client_hangs_up_at_its_end_is_stored_all_the_same(tmp_path: Path) -> None:
    """All its bytes are there: the work goes on without the client."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        payload = server.payload_of(order)
        has_ended = asyncio.Event()

        async def chunks() -> AsyncIterator[memoryview]:
            yield memoryview(payload)
            has_ended.set()

        call = asyncio.create_task(
            server.client_api.upload(
                server.session_ids[0], update_of(order, payload), chunks(), offset=0
            )
        )
        await has_ended.wait()
        # The next thing it waits for is that its bytes are examined and recorded.
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert server.states(server.latest())[0] == OrderState.STORED

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_an_encoding_that_the_run_does_not_take_is_refused(tmp_path: Path) -> None:
    """The header says so before any byte."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        answer = await server.answer(0, encoding=Encoding.INT8)
        assert answer.receipt is Receipt.REFUSED
        assert answer.reason == "the update's encoding is int8; this run takes state-dict"

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_who_waits_for_a_slot_is_not_late_and_learns_when_its_order_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot, held by client 0: client 1 waits, gives up, and is answered at once."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        orders = [server.order_of(client_id) for client_id in (0, 1)]
        payloads = [server.payload_of(order) for order in orders]
        has_begun, may_end = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[memoryview]:
            yield memoryview(payloads[0][:-1])
            has_begun.set()
            await may_end.wait()
            yield memoryview(payloads[0][-1:])

        first = asyncio.create_task(
            server.client_api.upload(
                server.session_ids[0], update_of(orders[0], payloads[0]), slow(), offset=0
            )
        )
        await has_begun.wait()
        second = asyncio.create_task(server.upload(server.session_ids[1], orders[1], payloads[1]))
        waiting = server.open_orders.find(orders[1].order_id)
        assert waiting is not None
        server.clock.now_s += 1000
        await held_up(server, monkeypatch).wait()
        assert server.open_orders.idle_s(waiting) == 0
        await give_up(server, 1)
        answer = await second
        assert (answer.receipt, answer.order_end) == (Receipt.LATE, OrderEnd.GIVEN_UP)
        may_end.set()
        assert (await first).receipt is Receipt.STORED

    with serving(tmp_path, max_uploads=1, stall_after=2, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_two_streams_of_the_same_whole_update_are_one_update(tmp_path: Path) -> None:
    """The second finds all bytes there: whichever is recorded first, the other is a duplicate."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order, session_id = server.order_of(0), server.session_ids[0]
        payload = server.payload_of(order)
        update, api = update_of(order, payload), server.client_api
        record = server.open_orders.open_record(order.order_id)
        assert record is not None
        first = await api.upload(session_id, update, chunks_of(payload), offset=0)
        # As a call that was on its way when the order was still open.
        server.open_orders.settle(order.order_id, OrderState.OPEN)
        second = await server.uploads.receive(record, update, chunks_of(), offset=len(payload))
        assert [first.receipt, second.receipt] == [Receipt.STORED, Receipt.DUPLICATE]
        assert server.states(server.latest())[0] == OrderState.STORED
        assert len(list((tmp_path / "spool").iterdir())) == 1

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_a_section_with_another_digest_is_refused(tmp_path: Path) -> None:
    """The payload's own digest is right: one of the two statements is a lie."""

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1)
        order = server.order_of(0)
        payload = server.payload_of(order)
        section = Section(name="model", digest="0" * 64, size_bytes=len(payload))
        answer = await server.upload(server.session_ids[0], order, payload, sections=(section,))
        assert answer.receipt is Receipt.REFUSED
        (held,) = server.store.quarantine.held_updates()
        assert held.refusal.evidence == {"kind": "section-digest", "section": "model"}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(upload(server))


@pytest.mark.parametrize(("value", "receipt"), [(0.5, Receipt.STORED), (1e30, Receipt.REFUSED)])
def test_control_variates_are_examined_beside_the_model(
    tmp_path: Path, value: float, receipt: Receipt
) -> None:
    """SCAFFOLD: a second section, each with its own digest, and a cap of its own."""

    async def upload(server: ServerRun) -> None:
        _, base = await server.begin(0, 1)
        order = server.order_of(0)
        model = server.payload_of(order)
        layout = control_layout(base.file.layout, server.context.kinds)
        control = encode_state(
            {
                name: torch.full(entry.shape, value, dtype=entry.dtype)
                for name, entry in layout.entries.items()
            }
        )
        sections = tuple(
            Section(name=name, digest=digest_bytes(part), size_bytes=len(part))
            for name, part in (("model", model), ("control", control))
        )
        payload = model + control
        answer = await server.upload(server.session_ids[0], order, payload, sections=sections)
        assert answer.receipt is receipt
        assert ("control variates change by" in answer.reason) == (receipt is Receipt.REFUSED)

    with serving(tmp_path, strategy="scaffold", momentum=0, **SETTINGS) as server:
        asyncio.run(upload(server))


def test_free_pages_are_given_back_after_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after each update: that costs a look at the whole heap."""
    calls: list[None] = []
    monkeypatch.setattr(uploads, "return_free_pages", lambda: calls.append(None))
    monkeypatch.setattr(uploads, "_TIDYING_BYTES", 3000)

    async def upload(server: ServerRun) -> None:
        await server.begin(0, 1, 2)
        for client_id in (0, 1, 2):
            assert (await server.answer(client_id)).receipt is Receipt.STORED
            assert len(calls) == (0, 1, 1)[client_id]

    with serving(tmp_path, min_clients=3) as server:
        asyncio.run(upload(server))

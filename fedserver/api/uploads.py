"""Takes updates in, from the first byte to the receipt.

header validated -> bytes appended to the spool -> digest -> content validated -> fdatasync ->
recorded in one transaction -> receipt. Each step rests on the one before: a receipt is given only
for bytes that survive a loss of power. Memory is bounded: one chunk a stream, one stream an order,
and a bounded number of streams; the others wait in HTTP/2's flow control.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import replace

from fedrounds.errors import (
    CorruptPayload,
    InvalidInput,
    ServerUnreachable,
    StreamFenced,
)
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.memory import return_free_pages
from fedrounds.strategies.server_step import control_layout
from fedrounds.types import (
    CONTROL_SECTION,
    METRIC_NAMES,
    MODEL_SECTION,
    ClientUpdate,
    IncidentKind,
    Receipt,
    UploadAnswer,
)
from fedserver.clients.open_orders import OpenOrders, OpenRound
from fedserver.flow_control import Slots, StreamFence
from fedserver.housekeeping.retention import evict_updates
from fedserver.phases import OrderEvent, OrderState
from fedserver.records import Arrival, Event, OrderRecord, Refusal
from fedserver.run_context import RunContext
from fedserver.run_settings import compression_of
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.admission import (
    UpdateRefused,
    validate_content,
    validate_control,
    validate_header,
    validate_section_digests,
)
from fedserver.updates.payload import update_file
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool, UpdateStream

logger = logging.getLogger(__name__)

_ANSWERS = {
    OrderState.STORED: Receipt.STORED,
    OrderState.REFUSED: Receipt.REFUSED,
    OrderState.LATE: Receipt.LATE,
    OrderState.ABANDONED: Receipt.LATE,
}

_GOOD = (OrderState.STORED, OrderState.COUNTED)

_TIDYING_BYTES = 32 << 20
"""The heap's free pages are given back after so many bytes: that costs a look at the whole heap."""

_LEAST_BYTES_PER_S = 128 << 10
"""A stream that brings less gives its slot up, if others wait for it; its client resumes it."""


class _OrderEnded(Exception):
    """The order of a stream has ended: the rest of its bytes isn't wanted."""


class Uploads:
    """Takes updates in; the server has a single receiver."""

    def __init__(
        self,
        context: RunContext,
        *,
        open_orders: OpenOrders,
        store: AsyncStore,
        spool: Spool,
        quarantine: QuarantineFolder,
        threads: Threads,
    ) -> None:
        self._context = context
        self._open_orders = open_orders
        self._store = store
        self._spool = spool
        self._quarantine = quarantine
        self._threads = threads
        self._slots = Slots(context.settings.max_uploads)
        self._newest = StreamFence(1)
        # A stream nothing comes from gives its slot to others; the client resumes it.
        self._idle_s = context.settings.stall_after
        self._bytes_since_tidying = 0

    def committed_bytes(self, record: OrderRecord, digest: str) -> tuple[int, bool]:
        """Return the committed bytes of a payload, and whether its update is recorded."""
        if record.digest == digest:
            return 0, True
        return self._spool.committed_bytes(record.order_id, digest), False

    async def receive(
        self,
        record: OrderRecord,
        update: ClientUpdate,
        chunks: AsyncIterator[memoryview],
        *,
        offset: int,
    ) -> UploadAnswer:
        """Take one stream of an order's update in; returns when the receipt may be given.

        A `record` that says OPEN may be a moment old: the store decides when the update is there.

        Raises:
            WrongOffset, StreamFenced: another stream of this order was or is further.
            ServerUnreachable: the stream brought too little, or the round is changing.
            CorruptPayload: the bytes don't match the digest; they are dropped.
            InvalidInput: the stream holds more bytes than the header says.
            OutOfSpace: the disk is full; what is committed stays.
        """
        if record.state is not OrderState.OPEN:
            return await self._answer_ended(record, update)
        order = self._open_orders.find(update.order_id)
        if order is None:
            return await self._answer_ended_meanwhile(update)
        update = _with_declared(update, self._context.measurement_sizes)
        try:
            validate_header(update, order.given_in.base.file, order.given_in.limits)
            async with AsyncExitStack() as held:
                async with self._newest.join(
                    update.order_id, what=f"upload of order {update.order_id}"
                ):
                    await held.enter_async_context(self._slot(update.order_id))
                    stream = await held.enter_async_context(self._stream(update, offset=offset))
                    await self._append(update, stream, chunks)
                # All bytes are there. Outside of the fence: a newer stream can't end this stream
                # between durable and recorded.
                accepting = asyncio.ensure_future(
                    self._accept(record, update, stream, order.given_in)
                )
                # Without its client nobody else asks how that ended, and asyncio would complain.
                accepting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                try:
                    return await asyncio.shield(accepting)
                finally:
                    # A client that hangs up now has sent all there is: go on without it.
                    await asyncio.wait([accepting])
        except UpdateRefused as error:
            return await self._end(record, update, OrderEvent.REFUSE, refusal=error.refusal)
        except _OrderEnded:
            return await self._answer_ended_meanwhile(update)

    @asynccontextmanager
    async def _slot(self, order_id: str) -> AsyncIterator[None]:
        """Hold a slot; a client that waits for a slot is held up by the server and isn't late."""

        def note_waiting() -> None:
            self._require_open(order_id)
            self._open_orders.note_waiting(order_id)

        async with self._slots.hold(every_s=self._idle_s / 4, while_waiting=note_waiting):
            self._require_open(order_id)
            yield

    def _require_open(self, order_id: str) -> None:
        if self._open_orders.open_record(order_id) is None:
            raise _OrderEnded

    @asynccontextmanager
    async def _stream(self, update: ClientUpdate, *, offset: int) -> AsyncIterator[UpdateStream]:
        """Hold the open file of an update; see `Spool.open_stream`."""
        on_disk = self._threads.on_disk
        opened = ExitStack()
        stream = self._spool.open_stream(update.order_id, update.digest, offset=offset)
        opening = asyncio.ensure_future(on_disk(opened.enter_context, stream))
        try:
            yield await asyncio.shield(opening)
        finally:
            # A client that hangs up now leaves no file open behind.
            await asyncio.wait([opening])
            # A stream that is ended meanwhile doesn't hear that its file didn't open.
            opening.exception()
            await asyncio.shield(on_disk(opened.close))

    async def _append(
        self, update: ClientUpdate, stream: UpdateStream, chunks: AsyncIterator[memoryview]
    ) -> None:
        clock, counted = asyncio.get_running_loop().time, stream.offset
        try:
            async with asyncio.timeout(self._idle_s) as idle_timeout:
                async for chunk in chunks:
                    if not chunk:
                        # No progress: a client that sends nothing else gives its slot to others.
                        continue
                    # The order may have ended while the last chunk was awaited.
                    self._require_open(update.order_id)
                    if stream.offset + len(chunk) > update.size_bytes:
                        raise InvalidInput(
                            f"order {update.order_id}: the stream holds more than the "
                            f"{update.size_bytes} bytes that its header says"
                        )
                    await self._threads.on_disk(stream.append, chunk)
                    self._open_orders.note_bytes(update.order_id)
                    is_enough = stream.offset - counted >= self._idle_s * _LEAST_BYTES_PER_S
                    if is_enough or not self._slots.are_wanted:
                        idle_timeout.reschedule(clock() + self._idle_s)
                        counted = stream.offset
        except TimeoutError:
            what = "nothing" if stream.offset == counted else "too little"
            raise ServerUnreachable(
                f"order {update.order_id}: {what} came for {self._idle_s:g} s; "
                f"{stream.offset} bytes are there, ask QueryUpload and send the rest"
            ) from None
        if stream.offset != update.size_bytes:
            raise ServerUnreachable(
                f"order {update.order_id}: the stream ended at byte {stream.offset} of "
                f"{update.size_bytes}; ask QueryUpload and send the rest"
            )

    async def _accept(
        self, record: OrderRecord, update: ClientUpdate, stream: UpdateStream, given_in: OpenRound
    ) -> UploadAnswer:
        settled = await self._threads.on_disk(self._settle_bytes, update, stream, given_in)
        if isinstance(settled, Refusal):
            return await self._end(
                record, update, OrderEvent.REFUSE, refusal=settled, stream=stream
            )
        self._bytes_since_tidying += update.size_bytes
        if self._bytes_since_tidying > _TIDYING_BYTES:
            self._bytes_since_tidying = 0
            await self._threads.on_disk(return_free_pages)
        failpoint(FailPoint.UPDATE_DURABLE)
        return await self._end(record, update, OrderEvent.STORE, stream=stream, delta_norm=settled)

    def _settle_bytes(
        self, update: ClientUpdate, stream: UpdateStream, given_in: OpenRound
    ) -> float | Refusal:
        """Return the norm of a good update's delta, durable by then, or why it is refused."""
        if stream.digest() != update.digest:
            self._spool.discard(stream)
            raise CorruptPayload(
                f"order {update.order_id}: the bytes don't match digest {update.digest}; "
                "they were dropped, send the payload again from byte 0"
            )
        admitted = self._admit(update, stream, given_in)
        if not isinstance(admitted, Refusal):
            # Durable before it is recorded, recorded before the receipt.
            self._spool.make_durable(stream)
        return admitted

    def _admit(
        self, update: ClientUpdate, stream: UpdateStream, given_in: OpenRound
    ) -> float | Refusal:
        """Return the norm of a good update's delta, or why it is refused."""
        try:
            validate_section_digests(stream.path, update)
            received = update_file(
                stream.path,
                base=given_in.base.file,
                kinds=self._context.kinds,
                compression=compression_of(self._context.settings, update.encoding),
                sections=[(section.name, section.size_bytes) for section in update.sections],
                num_examples=update.num_examples,
            )
            if CONTROL_SECTION in received.others:
                validate_control(
                    received.others[CONTROL_SECTION],
                    expected=control_layout(given_in.base.file.layout, self._context.kinds),
                    limits=given_in.limits,
                )
            return validate_content(
                received,
                base=given_in.base.file,
                kinds=self._context.kinds,
                limits=given_in.limits,
            )
        except UpdateRefused as error:
            return error.refusal
        except InvalidInput as error:
            return UpdateRefused(str(error), kind="malformed").refusal

    async def _end(
        self,
        record: OrderRecord,
        update: ClientUpdate,
        order_event: OrderEvent,
        *,
        refusal: Refusal | None = None,
        stream: UpdateStream | None = None,
        delta_norm: float | None = None,
    ) -> UploadAnswer:
        """Record how an order ended; an update that isn't stored goes into quarantine."""
        if order_event is not OrderEvent.STORE:
            update = _with_known_names(update)
        open_order = self._open_orders.find(update.order_id)
        handed_out_at = None if open_order is None else open_order.handed_out_at
        answered_s = (
            None
            if open_order is None or handed_out_at is None
            else time.monotonic() - open_order.handed_out_s
        )
        arrival = Arrival(
            update=update,
            order_event=order_event,
            refusal=refusal,
            delta_norm=delta_norm,
            kept_bytes=0 if stream is None else stream.offset,
            handed_out_at=handed_out_at,
            answered_s=answered_s,
        )
        while True:
            collecting = self._open_orders.current
            state, is_recorded = await self._store.orders.record_arrival(
                record.run_id, arrival, buffer_size=self._context.strategy.buffer_size
            )
            if state is not OrderState.OPEN:
                break
            # The buffer is full: this update comes into the next round, which opens in a moment.
            # It isn't the client that is slow.
            self._open_orders.note_waiting(update.order_id)
            if self._open_orders.current is collecting:
                await self._open_orders.work_changed.wait(self._idle_s / 4)
        failpoint(FailPoint.UPDATE_RECORDED)
        # Memory follows the store: this wakes the round loop, which may close the round.
        self._open_orders.settle(update.order_id, state)
        if not is_recorded:
            record = await self._store.orders.find_order(update.order_id)
            if record.digest == update.digest and record.state not in _GOOD:
                # An older stream of the same bytes was recorded; this stream holds their file.
                await self._hold(update, stream)
            return await self._answer_ended(record, update)
        if state not in _GOOD:
            await self._hold(update, stream)
        if _ANSWERS[state] is Receipt.LATE:
            return await self._late_answer(update)
        return UploadAnswer(receipt=_ANSWERS[state], reason=refusal.reason if refusal else "")

    async def _late_answer(self, update: ClientUpdate) -> UploadAnswer:
        order_end = await self._store.orders.find_order_end(update.order_id)
        return UploadAnswer(receipt=Receipt.LATE, order_end=order_end)

    async def _hold(self, update: ClientUpdate, stream: UpdateStream | None) -> None:
        """Move the bytes of an update that is kept out into the quarantine."""
        if stream is None:
            return
        quarantine, on_disk = self._quarantine, self._threads.on_disk
        path = quarantine.path(update.order_id, update.digest)
        # A newer stream that has taken the file over does this, or the end of the round.
        with suppress(StreamFenced):
            await on_disk(self._spool.hand_over, stream, path)
        await evict_updates(store=self._store, quarantine=quarantine, threads=self._threads)

    async def _answer_ended_meanwhile(self, update: ClientUpdate) -> UploadAnswer:
        """Answer a stream whose order isn't open in memory any more, as the store has it."""
        record = await self._store.orders.find_order(update.order_id)
        if record.state is OrderState.OPEN:
            raise ServerUnreachable(f"order {update.order_id}: the round is changing; try again")
        return await self._answer_ended(record, update)

    async def _answer_ended(self, record: OrderRecord, update: ClientUpdate) -> UploadAnswer:
        if record.digest is None:
            return await self._end(record, update, OrderEvent.MISS)
        is_same = record.digest == update.digest
        if not is_same:
            await self._note_contradiction(record, update)
        if record.state is OrderState.REFUSED:
            return UploadAnswer(receipt=Receipt.REFUSED, reason=record.reason or "")
        if record.state in (OrderState.LATE, OrderState.ABANDONED):
            return await self._late_answer(update)
        if is_same:
            return UploadAnswer(receipt=Receipt.DUPLICATE)
        reason = f"order {update.order_id} has an update with other bytes; the first one stands"
        return UploadAnswer(receipt=Receipt.REFUSED, reason=reason)

    async def _note_contradiction(self, record: OrderRecord, update: ClientUpdate) -> None:
        """Record, once, that an order which had an update was sent an update with other bytes."""
        event = Event(
            kind=IncidentKind.UPDATE_CONTRADICTED,
            occurred_at=time.time(),
            round_number=record.round_number,
            attempt=record.attempt,
            client_id=record.client_id,
            is_incident=True,
            fields={"first": record.digest, "second": update.digest},
        )
        await self._store.events.add_events(
            record.run_id, [event], report_key=f"{update.order_id}=contradicted"
        )


def _with_declared(update: ClientUpdate, sizes: Mapping[str, int]) -> ClientUpdate:
    """Return an update without measurements of names or sizes that the run's task doesn't have.

    They change no model, so a client whose task has other metrics takes part all the same.
    """
    declared = {
        name: values
        for name, values in update.measurements.items()
        if sizes.get(name) == len(values)
    }
    if num_dropped := len(update.measurements) - len(declared):
        logger.warning(
            "order %s: %d measurements aren't those of this task's metrics, and are dropped",
            update.order_id,
            num_dropped,
        )
    return replace(update, measurements=declared)


def _with_known_names(update: ClientUpdate) -> ClientUpdate:
    """Return an update without unknown metrics and sections: no text of a client is kept."""
    return replace(
        update,
        measurements={},
        metrics={name: value for name, value in update.metrics.items() if name in METRIC_NAMES},
        sections=tuple(
            section
            for section in update.sections
            if section.name in (MODEL_SECTION, CONTROL_SECTION)
        ),
    )

"""The calls of clients, in the domain's terms; the servicer only translates."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from fedrounds.diagnosis.as_json import diagnosis_fields
from fedrounds.diagnosis.values import Origin
from fedrounds.errors import (
    FederationError,
    InvalidInput,
    NotFound,
    OutOfFiles,
    OutOfSpace,
    ServerUnreachable,
    StateDirCopied,
    WrongSettings,
)
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.files import exhaustion
from fedrounds.types import (
    INCIDENT_NUMBERS,
    NO_COMPRESSION,
    ClientUpdate,
    Compression,
    Counters,
    Encoding,
    EntryKind,
    Incident,
    IncidentKind,
    Leave,
    OrderEnd,
    Registration,
    RunEnd,
    SessionInfo,
    UploadAnswer,
    Waiting,
    Work,
    WorkState,
)
from fedserver.api.uploads import Uploads
from fedserver.clients.departures import leave
from fedserver.clients.open_orders import OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.models.downloads import Downloads
from fedserver.phases import OrderState
from fedserver.quorum import clients_to_open
from fedserver.records import Event, OrderRecord, Session, json_number
from fedserver.run_context import RunContext
from fedserver.run_settings import run_compression
from fedserver.store import AsyncStore

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 20.0

_GOING_ON = (OrderState.OPEN, OrderState.STORED)


class ClientApi:
    """Answers clients. Every method may be called again with the same arguments."""

    def __init__(
        self,
        context: RunContext,
        *,
        sessions: Sessions,
        open_orders: OpenOrders,
        store: AsyncStore,
        uploads: Uploads,
        downloads: Downloads,
        disk: DiskWatch,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._uploads = uploads
        self._downloads = downloads
        self._disk = disk
        self._run_end: RunEnd | None = None
        self._is_stopping = False
        self._informed: set[str] = set()

    async def register(self, registration: Registration) -> SessionInfo:
        """Open a session.

        Raises:
            WrongSettings: the client insists on another task.
            InvalidInput, ClientIdTaken, StateDirCopied: see `Sessions.register`.
        """
        settings = self._context.settings
        if registration.task and registration.task != settings.task:
            raise WrongSettings(
                f"this run's task is {settings.task!r}, the client insists on "
                f"{registration.task!r}; start it with --task {settings.task}, or the server"
                f" with --task {registration.task}"
            )
        has_live_holder = self._sessions.has_live_holder
        was_live = any(map(has_live_holder, registration.client_ids))
        try:
            session, replaced = self._sessions.register(registration)
        except StateDirCopied:
            # Both processes are refused; only the call that ended their session is an incident.
            if was_live and not any(map(has_live_holder, registration.client_ids)):
                await self._note_copy(registration.client_ids)
            raise
        # Memory has the new session already. Killed before this is recorded, the client is unknown
        # at the next start, and registers again.
        for session_id in replaced:
            await self._store.runs.remove_session(session_id)
        await self._store.runs.save_session(self._context.run_id, session)
        return SessionInfo(
            session_id=session.session_id,
            run_id=self._context.run_id,
            task=settings.task,
            partitioning=settings.partitioning,
            max_wait_s=_MAX_WAIT_S,
            lease_s=settings.lease,
            total_rounds=settings.rounds,
            compression=self._compression_for(registration),
            entry_kinds=self._context.kinds,
        )

    async def _note_copy(self, client_ids: Sequence[int]) -> None:
        event = event_of(
            IncidentKind.STATE_DIR_COPIED,
            self._open_orders.latest,
            client_id=client_ids[0] if len(client_ids) == 1 else None,
            is_incident=True,
            **({"clients": sorted(client_ids)} if len(client_ids) > 1 else {}),
        )
        await self._store.events.add_events(self._context.run_id, [event])

    def _compression_for(self, registration: Registration) -> Compression:
        """Return the compression that a client is to use; none if the client doesn't know it."""
        compression = run_compression(self._context.settings)
        if compression.encoding in (Encoding.STATE_DICT, *registration.capabilities):
            return compression
        logger.info(
            "clients %s can't compress by %s and send whole updates",
            ", ".join(map(str, registration.client_ids)),
            compression.encoding,
        )
        return NO_COMPRESSION

    async def pull_work(self, session_id: str, *, wait_s: float) -> Work:
        """Return an order, WAIT after at most `wait_s` seconds, or FINISHED.

        Raises:
            UnknownSession: register again.
            ServerUnreachable: the server is stopping.
        """
        # A parked client is live: the lease is renewed at both ends of the wait, so the wait
        # must be shorter than it.
        deadline = time.monotonic() + min(wait_s, _MAX_WAIT_S, self._context.settings.lease / 2)
        while True:
            session = self._sessions.touch(session_id)
            if self._is_stopping:
                raise ServerUnreachable("the server is stopping; it goes on when started again")
            if self._run_end is not None:
                self._informed.add(session_id)
                return Work(state=WorkState.FINISHED, run_end=self._run_end)
            client_ids = self._sessions.ids_here(session)
            if (order := self._open_orders.open_order_of(client_ids)) is not None:
                return Work(state=WorkState.ORDER, order=self._open_orders.hand_out(order))
            remaining_s = deadline - time.monotonic()
            # Nothing is awaited between the look for an order and this wait: no order is missed.
            if remaining_s <= 0 or not await self._open_orders.work_changed.wait(remaining_s):
                self._sessions.touch(session_id)
                return Work(state=WorkState.WAIT, waiting=self._waiting())

    def _waiting(self) -> Waiting:
        """Return the reason why there is no order yet."""
        current, here = self._open_orders.current, self._open_orders.clients_here
        if current is not None:
            return Waiting(round_number=current.record.round_number)
        if here is not None:
            needed = clients_to_open(self._context.settings)
            return Waiting(clients_here=here, clients_needed=needed)
        return Waiting()

    async def download(
        self,
        session_id: str,
        digest: str,
        *,
        offset: int,
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """Write a blob's framed chunks; a chunk that leaves is progress of the session's order."""
        session = self._sessions.touch(session_id)

        def note(note_for_order: Callable[[str], None]) -> None:
            self._sessions.touch(session_id)
            if (order := self._open_orders.open_order_of(session.client_ids)) is not None:
                note_for_order(order.order.order_id)

        await self._downloads.send(
            digest,
            offset=offset,
            write=write,
            on_progress=functools.partial(note, self._open_orders.note_bytes),
            on_waiting=functools.partial(note, self._open_orders.note_waiting),
        )

    async def committed_bytes(
        self, session_id: str, order_id: str, digest: str
    ) -> tuple[int, bool]:
        """Return the committed bytes of a payload, and whether its update is recorded."""
        record = await self._find_order(session_id, order_id)
        return self._uploads.committed_bytes(record, digest)

    async def upload(
        self,
        session_id: str,
        update: ClientUpdate,
        chunks: AsyncIterator[memoryview],
        *,
        offset: int,
    ) -> UploadAnswer:
        """Take an update in; see `Uploads.receive`."""
        record = await self._find_order(session_id, update.order_id)
        return await self._uploads.receive(record, update, chunks, offset=offset)

    async def report_progress(
        self,
        session_id: str,
        order_id: str,
        *,
        counters: Counters,
        incidents: Sequence[tuple[int, Incident]],
        gave_up: bool,
    ) -> OrderEnd | None:
        """Note a client's counters and incidents, each with its number within the order.

        Returns how the order has ended, None while it goes on.

        Raises:
            InvalidInput: a diagnosis names what the task's model doesn't have; nothing is noted.
        """
        order = self._open_orders.find(order_id)
        if order is not None and not incidents and not gave_up:
            # Nearly all reports: nothing to ask the store for.
            session = self._sessions.touch(session_id)
            self._validate_holder(session, order.order.client_id, order_id)
            self._open_orders.advance(order_id, counters)
            return None if order.state in _GOING_ON else await self._order_end(order_id)
        for _, incident in incidents:
            if incident.diagnosis is not None:
                self._validate_names(incident.diagnosis.origin)
        record = await self._find_order(session_id, order_id)
        # From here on the order may end, or the round close: the store decides what still counts.
        self._open_orders.advance(order_id, counters)
        for sequence, incident in incidents:
            event = _incident_event(
                incident,
                self._context.kinds,
                round_key=self._open_orders.round_key_of(record),
                client_id=record.client_id,
            )
            # With the key, a report that is sent again because its answer was lost stays one event.
            await self._store.events.add_events(
                record.run_id, [event], report_key=f"{order_id}#{sequence}"
            )
        if gave_up:
            round_number, attempt = self._open_orders.round_key_of(record)
            event = Event(
                kind="order-given-up",
                occurred_at=time.time(),
                round_number=round_number,
                attempt=attempt,
                client_id=record.client_id,
            )
            was_open = await self._store.orders.abandon_order(record.run_id, order_id, event)
            failpoint(FailPoint.ORDER_ABANDONED)
            if was_open:
                self._open_orders.settle(order_id, OrderState.ABANDONED)
        return await self._order_end(order_id)

    async def answer_for(self, call: str, error: Exception) -> FederationError:
        """Return the error that a client gets for an error in its call.

        An error that isn't the client's doing is recorded. Of an error that the server doesn't
        foresee, or of a full disk, the client gets no text.
        """
        if isinstance(error, OSError):
            error = exhaustion(error) or error
        if isinstance(error, FederationError) and error.status != FederationError.status:
            if isinstance(error, OutOfSpace):
                await self._disk.note_failure(call, error)
                # A client's person can free nothing on the server and learns no path of it.
                lacking = "files" if isinstance(error, OutOfFiles) else "disk space"
                return type(error)(
                    f"{call} failed: the server is out of {lacking}, as its log says; "
                    "the call may be repeated"
                )
            return error
        await self._disk.note_failure(call, error)
        return FederationError(
            f"the server failed in {call} in a way that it doesn't foresee; its log says more, and "
            "the call may be repeated later"
        )

    async def leave(self, session_id: str, request: Leave) -> None:
        """Let clients of a session go; see `fedserver.clients.departures`.

        Raises:
            UnknownSession: they have left already, or register in another run.
        """
        await leave(
            self._sessions.touch(session_id),
            request,
            run_id=self._context.run_id,
            require_all=self._context.settings.require_all,
            sessions=self._sessions,
            open_orders=self._open_orders,
            store=self._store,
        )

    async def finish(self, run_end: RunEnd) -> None:
        """Tell every live client how the run ended; returns when they know or time is up."""
        self._run_end = run_end
        self._open_orders.work_changed.notify()
        deadline = time.monotonic() + self._context.settings.farewell
        while self._sessions.live_sessions() - self._informed and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Send parked calls away: the server is about to end."""
        self._is_stopping = True
        self._open_orders.work_changed.notify()

    async def _find_order(self, session_id: str, order_id: str) -> OrderRecord:
        session = self._sessions.touch(session_id)
        record = self._open_orders.open_record(order_id)
        if record is None:
            record = await self._store.orders.find_order(order_id)
        self._validate_holder(session, record.client_id, order_id)
        return record

    async def _order_end(self, order_id: str) -> OrderEnd | None:
        return await self._store.orders.find_order_end(order_id)

    def _validate_holder(self, session: Session, client_id: int, order_id: str) -> None:
        if client_id not in session.client_ids:
            raise NotFound(f"order {order_id!r} isn't one of this session's")

    def _validate_names(self, origin: Origin) -> None:
        task = self._context.settings.task
        if origin.module not in self._context.modules:
            raise InvalidInput(
                f"a diagnosis names a module that the model of task {task!r} "
                "doesn't have; both sides need the same version of the task"
            )
        if origin.tensor and origin.tensor not in self._context.kinds:
            raise InvalidInput(
                "a diagnosis names a tensor that isn't in the state_dict of task "
                f"{task!r}; both sides need the same version of the task"
            )


def _incident_event(
    incident: Incident,
    kinds: Mapping[str, EntryKind],
    *,
    round_key: tuple[int, int],
    client_id: int,
) -> Event:
    """Return the event of an incident: declared names only, whatever else the client has sent."""
    fields = {
        **{
            name: json_number(value)
            for name, value in incident.detail.items()
            if name in INCIDENT_NUMBERS
        },
        "step": incident.step,
        "epoch": incident.epoch,
        "tensor": incident.tensor if incident.tensor in kinds else None,
        **diagnosis_fields(incident.diagnosis),
    }
    return Event(
        kind=incident.kind,
        occurred_at=time.time(),
        round_number=round_key[0],
        attempt=round_key[1],
        client_id=client_id,
        is_incident=True,
        fields={key: value for key, value in fields.items() if value is not None},
    )

"""Who is connected: sessions, the client ids they hold, and their leases.

Leases run on a monotonic clock that starts anew with the server: after a restart everybody has a
whole lease to come back.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable

from fedserver.records import Session
from fedserver.signals import Signal
from shared.errors import ClientIdTaken, InvalidInput, UnknownSession
from shared.types import Registration


class Sessions:
    """The sessions of one run, in memory; the caller keeps the store in step."""

    def __init__(
        self,
        known: Iterable[Session],
        *,
        lease_s: float,
        max_num_examples: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changed = Signal()
        self._lease_s = lease_s
        self._max_num_examples = max_num_examples
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._holders: dict[int, str] = {}
        self._last_call: dict[str, float] = {}
        for session in known:
            self._add(session)

    def register(self, registration: Registration) -> tuple[Session, list[str]]:
        """Open or take over a session; returns it and the ids of those it replaces.

        Raises:
            InvalidInput: an id is given twice, or a data size is missing or can't be.
            ClientIdTaken: another instance holds one of the ids and its lease goes on.
        """
        _examine(registration, max_num_examples=self._max_num_examples)
        replaced = []
        session_id = secrets.token_urlsafe(18)
        num_examples = registration.num_examples
        for holder in self._holders_of(registration.client_ids):
            if holder.instance_key != registration.instance_key and self.is_live(holder):
                taken = sorted(set(holder.client_ids) & set(registration.client_ids))
                raise ClientIdTaken(
                    f"client id {taken[0]} is in use by another process; stop that one, choose "
                    f"another --id or --ids, or wait {self._lease_s:g} s after its last call"
                )
            if holder.instance_key == registration.instance_key and (
                holder.client_ids == registration.client_ids
            ):
                session_id = holder.session_id
                num_examples = num_examples or holder.num_examples
            else:
                replaced.append(holder.session_id)
        for old in replaced:
            self._remove(old)
        session = Session(
            session_id=session_id,
            instance_key=registration.instance_key,
            client_ids=registration.client_ids,
            num_examples=num_examples,
            software_version=registration.software_version,
        )
        self._add(session)
        self.changed.notify()
        return session, replaced

    def touch(self, session_id: str) -> Session:
        """Return the session a call names and renew its lease.

        Raises:
            UnknownSession: there is none; the client registers again.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession("the server doesn't know this session; register again")
        self._last_call[session_id] = self._clock()
        return session

    def is_live(self, session: Session) -> bool:
        """Whether the session's lease goes on."""
        return self._clock() - self._last_call[session.session_id] < self._lease_s

    def has_live_holder(self, client_id: int) -> bool:
        """Whether a session with a lease that goes on serves this client id."""
        holder = self._holders.get(client_id)
        return holder is not None and self.is_live(self._sessions[holder])

    def ready_clients(self, *, only_live: bool) -> set[int]:
        """Return the client ids that have told how much data they have."""
        return {
            client_id
            for session in self._sessions.values()
            if session.num_examples and (not only_live or self.is_live(session))
            for client_id in session.client_ids
        }

    def data_sizes(self) -> dict[int, int]:
        """Return how many examples each client has, of those that have told."""
        return {
            client_id: size
            for session in self._sessions.values()
            for client_id, size in zip(session.client_ids, session.num_examples, strict=False)
        }

    def live_sessions(self) -> set[str]:
        """Return the ids of the sessions whose lease goes on."""
        return {key for key, session in self._sessions.items() if self.is_live(session)}

    def _holders_of(self, client_ids: Iterable[int]) -> list[Session]:
        held = {self._holders[client] for client in client_ids if client in self._holders}
        return [self._sessions[session_id] for session_id in sorted(held)]

    def _add(self, session: Session) -> None:
        self._sessions[session.session_id] = session
        self._last_call[session.session_id] = self._clock()
        for client_id in session.client_ids:
            self._holders[client_id] = session.session_id

    def _remove(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        del self._last_call[session_id]
        for client_id in session.client_ids:
            if self._holders.get(client_id) == session_id:
                del self._holders[client_id]


def _examine(registration: Registration, *, max_num_examples: int) -> None:
    ids, sizes = registration.client_ids, registration.num_examples
    if repeated := [client_id for client_id, times in Counter(ids).items() if times > 1]:
        raise InvalidInput(f"client id {repeated[0]} is given twice; give different numbers")
    if sizes and len(sizes) != len(ids):
        raise InvalidInput(f"{len(sizes)} data sizes for {len(ids)} client ids; give one for each")
    for client_id, size in zip(ids, sizes, strict=False):
        if not 1 <= size <= max_num_examples:
            raise InvalidInput(
                f"client {client_id} has {size} examples; this run takes clients with 1 to "
                f"{max_num_examples}: see the server's --max-num-examples"
            )

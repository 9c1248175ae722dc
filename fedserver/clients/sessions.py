"""Sessions, the client ids they hold, and their leases.

A client that has left is in no session. A client that is expected back stays in its session, and
counts as gone until it registers again.

Leases run on a monotonic clock that starts anew with the server: after a restart everybody has a
whole lease to come back.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from fedrounds.errors import ClientIdTaken, InvalidInput, StateDirCopied, UnknownSession
from fedrounds.types import Registration
from fedserver.records import Session
from fedserver.runtime import Broadcast

_MAX_TURNS = 2
"""How often one process may take a session over, unless copies of its state-dir are in use.

The second time may be a call that was long on its way, or two processes that overlap for a while.
"""

_NUM_PROCESSES_KEPT = 32


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
        self.changed = Broadcast()
        self._lease_s = lease_s
        self._max_num_examples = max_num_examples
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._holders: dict[int, str] = {}
        self._last_call: dict[str, float] = {}
        self._away_since: dict[int, float] = {}
        self._data_sizes: dict[int, int] = {}
        self._refused_processes: set[str] = set()
        for session in known:
            self._add(session)

    def register(self, registration: Registration) -> tuple[Session, list[str]]:
        """Open or take over a session; returns it and the ids of those it replaces.

        Raises:
            InvalidInput: an id is given twice, or a data size is missing or can't be.
            ClientIdTaken: another instance holds an id, and its lease goes on.
            StateDirCopied: this process and another process of the same instance take the session
                over from each other. Nobody has it from now on, until a new process registers.
        """
        _validate(registration, max_num_examples=self._max_num_examples)
        holders = self._holders_of(registration.client_ids)
        key = registration.process_key
        for holder in holders:
            if holder.instance_key != registration.instance_key and self.is_live(holder):
                taken = sorted(set(holder.client_ids) & set(registration.client_ids))
                raise ClientIdTaken(
                    f"client id {taken[0]} is in use by another process; stop that one, choose "
                    f"another --id or --ids, or wait {self._lease_s:g} s after its last call"
                )
        own = [holder for holder in holders if holder.instance_key == registration.instance_key]
        processes = self._take_turn(registration, own) if registration.process_key else ()
        replaced = []
        session_id = secrets.token_urlsafe(18)
        num_examples = registration.num_examples
        for holder in holders:
            is_same = holder in own and holder.client_ids == registration.client_ids
            if is_same:
                num_examples = num_examples or holder.num_examples
            if is_same and (not key or holder.processes[-1:] == (key,)):
                session_id = holder.session_id
            else:
                replaced.append(holder.session_id)
        for old in replaced:
            self._remove(old)
        for client_id in registration.client_ids:
            self._away_since.pop(client_id, None)
        session = Session(
            session_id=session_id,
            instance_key=registration.instance_key,
            client_ids=registration.client_ids,
            num_examples=num_examples,
            software_version=registration.software_version,
            processes=processes,
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
        if session is None or not self.ids_here(session):
            raise UnknownSession("the server doesn't know this session; register again")
        self._last_call[session_id] = self._clock()
        return session

    def leave(
        self, client_ids: Collection[int], *, expected: Collection[int] = ()
    ) -> tuple[list[Session], list[str]]:
        """Take clients out of their sessions, but for those that are `expected` back.

        Returns the sessions that have changed, and the ids of those without any client left.
        """
        changed, ended = [], []
        now = self._clock()
        for session in self._holders_of(client_ids):
            leaving = set(client_ids) & set(session.client_ids) - set(expected)
            for client_id in set(client_ids) & set(session.client_ids) & set(expected):
                self._away_since.setdefault(client_id, now)
            staying = [client_id for client_id in session.client_ids if client_id not in leaving]
            if not leaving:
                continue
            away_since, last_call = dict(self._away_since), self._last_call[session.session_id]
            self._remove(session.session_id)
            if not staying:
                ended.append(session.session_id)
                continue
            sizes = dict(zip(session.client_ids, session.num_examples, strict=False))
            shrunk = replace(
                session,
                client_ids=tuple(staying),
                num_examples=tuple(sizes[client_id] for client_id in staying if sizes),
            )
            self._add(shrunk)
            self._last_call[session.session_id] = last_call
            self._away_since |= {
                client_id: since for client_id, since in away_since.items() if client_id in staying
            }
            changed.append(shrunk)
        self.changed.notify()
        return changed, ended

    def away_s(self, client_id: int) -> float | None:
        """Return the seconds since a client left that is expected back; None for any other."""
        since = self._away_since.get(client_id)
        return None if since is None else self._clock() - since

    def ids_here(self, session: Session) -> Sequence[int]:
        """Return the clients of a session that aren't away."""
        if not self._away_since:
            return session.client_ids
        return [client_id for client_id in session.client_ids if client_id not in self._away_since]

    def is_live(self, session: Session) -> bool:
        """Whether the session's lease goes on, and not all of its clients have left."""
        return not self._is_lease_over(session) and bool(self.ids_here(session))

    def holder_of(self, client_id: int) -> str | None:
        """Return the id of the session that serves a client or expects it back; None: none does."""
        return self._holders.get(client_id)

    def silent_s(self, client_id: int) -> float:
        """Return the seconds since the session that serves a client last called."""
        return self._clock() - self._last_call[self._holders[client_id]]

    def num_examples_of(self, client_id: int) -> int:
        """Return the number of a client's examples; 0 until it registers that number."""
        return self._data_sizes.get(client_id, 0)

    def has_live_holder(self, client_id: int) -> bool:
        """Whether the client is there: in a session with a lease that goes on, and not away."""
        holder = self._holders.get(client_id)
        return (
            holder is not None
            and client_id not in self._away_since
            and self.is_live(self._sessions[holder])
        )

    def ready_clients(self, *, only_live: bool) -> set[int]:
        """Return the clients that have registered with the size of their data."""
        return {
            client_id
            for session in self._sessions.values()
            if session.num_examples and (not only_live or self.is_live(session))
            for client_id in (self.ids_here(session) if only_live else session.client_ids)
        }

    def data_sizes(self) -> Mapping[int, int]:
        """Return the number of examples of each client that has registered with it."""
        return self._data_sizes

    def live_sessions(self) -> set[str]:
        """Return the ids of the sessions whose lease goes on."""
        return {key for key, session in self._sessions.items() if self.is_live(session)}

    def _take_turn(self, registration: Registration, own: Sequence[Session]) -> tuple[str, ...]:
        """Return the processes that had their instance's sessions, the process that registers last.

        Raises:
            StateDirCopied: see `register`.
        """
        key = registration.process_key
        copied = StateDirCopied(
            "another process uses a copy of the state-dir of client id "
            f"{registration.client_ids[0]} at the same time; both are refused. Stop one of them, "
            "and start it again with a new --state-dir and another --id or --ids"
        )
        if key in self._refused_processes:
            raise copied
        histories = [session.processes for session in own if not self._is_lease_over(session)]
        processes = max(histories, key=len, default=())
        if processes[-1:] != (key,):
            processes = (*processes, key)[-_NUM_PROCESSES_KEPT:]
        if processes.count(key) <= _MAX_TURNS:
            return processes
        self._refused_processes.update(
            process for process, turns in Counter(processes).items() if turns > 1
        )
        for session in own:
            for client_id in session.client_ids:
                self._away_since.setdefault(client_id, self._clock())
        self.changed.notify()
        raise copied

    def _is_lease_over(self, session: Session) -> bool:
        return self._clock() - self._last_call[session.session_id] >= self._lease_s

    def _holders_of(self, client_ids: Iterable[int]) -> list[Session]:
        held = {self._holders[client] for client in client_ids if client in self._holders}
        return [self._sessions[session_id] for session_id in sorted(held)]

    def _add(self, session: Session) -> None:
        self._sessions[session.session_id] = session
        self._last_call[session.session_id] = self._clock()
        for client_id in session.client_ids:
            self._holders[client_id] = session.session_id
        for client_id, size in zip(session.client_ids, session.num_examples, strict=False):
            self._data_sizes[client_id] = size

    def _remove(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        del self._last_call[session_id]
        for client_id in session.client_ids:
            if self._holders.get(client_id) == session_id:
                del self._holders[client_id]
                self._data_sizes.pop(client_id, None)
                self._away_since.pop(client_id, None)


def _validate(registration: Registration, *, max_num_examples: int) -> None:
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

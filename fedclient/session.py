"""The session with the server, and the repetition of calls until the server answers.

Every call of the main loop goes through here. It is repeated until the server answers, and made
with a new session if the server has forgotten the old session.
"""

import itertools
import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedclient.connection import Connection
from fedclient.progress import Stopped
from fedrounds import __version__
from fedrounds.errors import (
    FederationError,
    InvalidInput,
    NoAnswer,
    OutOfSpace,
    ServerUnreachable,
    UnknownSession,
)
from fedrounds.types import Encoding, Leave, LeaveReason, Registration, SessionInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_MAX_CAUSES_LOGGED = 3
_CAPABILITIES = tuple(encoding for encoding in Encoding if encoding is not Encoding.STATE_DICT)


class Patience:
    """Repeats a call until the server answers, and says why it doesn't.

    `stop` is set when somebody asks the process to end. After `give_up_after_s` seconds without any
    answer it gives up. `show_trouble` is called with a short sentence when a call fails and will be
    repeated, and with an empty text when a call then succeeds.
    """

    def __init__(
        self,
        *,
        server: str,
        stop: threading.Event,
        give_up_after_s: float = math.inf,
        show_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._server = server
        self._stop = stop
        self._give_up_after_s = give_up_after_s
        self._show_trouble = show_trouble
        self._has_answered = False

    def reach(self, connection: Connection) -> None:
        """Wait until the server has answered for the first time.

        Raises:
            Stopped: somebody asked the process to end.
            NoAnswer: the server didn't answer for too long.
        """
        # The first is short, so that a connection without any answer shows soon.
        timeouts_s = itertools.chain([1.0, 2, 4, 8, 16], itertools.repeat(30.0))
        self.insist(lambda: connection.check(timeout_s=next(timeouts_s)))

    def insist(self, attempt: Callable[[], T], *, how_far: Callable[[], int] = lambda: 0) -> T:
        """Return the result of `attempt`, once the server answers.

        Each cause of a failure is logged once, and so is the first answer after a failure. The
        pauses between attempts grow. They begin anew after an attempt that got further than the
        attempt before, by `how_far`.

        Raises:
            Stopped: somebody asked the process to end.
            NoAnswer: the server didn't answer for too long.
            FederationError: an answer that trying again won't change.
        """
        pause_s, reached = FIRST_PAUSE_S, how_far()
        logged: set[str] = set()
        recovery = ""
        answered_at = time.monotonic()
        while True:
            try:
                result = attempt()
            except FederationError as error:
                if self._stop.is_set():
                    raise Stopped from None
                if not error.retry:
                    raise
                if str(error) not in logged and len(logged) < _MAX_CAUSES_LOGGED:
                    logged.add(str(error))
                    recovery = self._log_failure(error)
                if not isinstance(error, ServerUnreachable):
                    answered_at = time.monotonic()
                if how_far() > reached:
                    pause_s, reached = FIRST_PAUSE_S, how_far()
                    answered_at = time.monotonic()
                if time.monotonic() - answered_at >= self._give_up_after_s:
                    raise NoAnswer(
                        f"{self._server} hasn't answered for {self._give_up_after_s:g} s "
                        f"(--give-up-after): {error}. The same command goes on"
                    ) from error
                # Jitter: the clients of a fleet must not all come back at the same moment.
                self.pause(random.uniform(pause_s / 2, pause_s))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if recovery:
                    logger.info("%s", recovery)
                    self._show_trouble("")
                self._has_answered = True
                return result

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: somebody asked the process to end.
        """
        if self._stop.wait(seconds):
            raise Stopped

    def _log_failure(self, error: FederationError) -> str:
        """Log why a call failed; return the sentence to log when a call succeeds again."""
        # An OutOfSpace without an OSError is the server's answer: its own disk is full.
        if isinstance(error, OutOfSpace) and isinstance(error.__cause__, OSError):
            logger.warning("%s; trying again until there is room", error)
            self._show_trouble("the disk is full; trying again until there is room")
            return "there is room again"
        logger.warning("no answer from %s: %s; trying again until it answers", self._server, error)
        self._show_trouble(f"no answer from {self._server}; trying again")
        return f"{self._server} answers{' again' if self._has_answered else ''}"


class ServerSession:
    """The session of a process's client ids with one server.

    `load_data(info)` loads the run's data and returns the number of examples of each id. Ids
    without examples don't take part.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        patience: Patience,
        client_ids: tuple[int, ...],
        instance_key: str,
        task: str,
        load_data: Callable[[SessionInfo], Sequence[int]],
    ) -> None:
        self.connection = connection
        self._patience = patience
        self._all_client_ids = self._client_ids = client_ids
        self._instance_key = instance_key
        self._process_key = uuid.uuid4().hex
        self._task = task
        self._load_data = load_data
        self._info: SessionInfo | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server has opened a session, which this process must leave before it ends."""
        return self._info is not None

    @property
    def client_ids(self) -> tuple[int, ...]:
        """The ids that this process still serves."""
        return self._client_ids

    @property
    def info(self) -> SessionInfo:
        """The session in force; read it after `open`."""
        assert self._info is not None
        return self._info

    def open(self) -> None:
        """Register; repeat until the server answers.

        Raises:
            Stopped: somebody asked the process to end.
            FederationError: an answer that trying again won't change.
        """
        self._patience.insist(self._register)

    def call(
        self, call: Callable[[SessionInfo], T], *, how_far: Callable[[], int] = lambda: 0
    ) -> T:
        """Return the result of a call, made with a new session if the server forgot the old.

        The call is repeated until the server answers (see `Patience.insist`).

        Raises:
            Stopped: somebody asked the process to end.
            FederationError: an answer that trying again won't change.
        """

        def attempt() -> T:
            while True:
                try:
                    return call(self.info)
                except UnknownSession:
                    # If another process takes over each new session, the server soon refuses.
                    self._register()
                    self._patience.pause(FIRST_PAUSE_S)

        return self._patience.insist(attempt, how_far=how_far)

    def leave(self, client_id: int, reason: LeaveReason) -> None:
        """Leave the run with one of several ids; the others stay.

        Raises:
            Stopped, NoAnswer, FederationError: see `call`.
        """
        self._client_ids = tuple(other for other in self._client_ids if other != client_id)
        leave = Leave(client_ids=(client_id,), reason=reason)
        self.call(lambda info: self.connection.leave(info.session_id, leave))

    def pause(self, seconds: float) -> None:
        """Wait (see `Patience.pause`)."""
        self._patience.pause(seconds)

    def _register(self) -> None:
        """Open the session: a first call asks for the task, a second reports the data's size."""
        # From here on the server knows these clients; when they leave, it must hear of it.
        self._info = self._registered(self._client_ids)
        sizes = self._load_data(self._info)
        num_examples = dict(zip(self._all_client_ids, sizes, strict=True))
        ready = tuple(client_id for client_id in self._client_ids if num_examples[client_id])
        if not ready:
            raise InvalidInput(
                f"client {', '.join(map(str, self._client_ids[:10]))}: there are no examples to "
                "train on; look at its data, or how the server deals data out (--partition)"
            )
        self._info = self._registered(ready, tuple(num_examples[client_id] for client_id in ready))

    def _registered(
        self, client_ids: tuple[int, ...], num_examples: tuple[int, ...] = ()
    ) -> SessionInfo:
        return self.connection.register(
            Registration(
                client_ids=client_ids,
                instance_key=self._instance_key,
                software_version=__version__,
                task=self._task,
                num_examples=num_examples,
                capabilities=_CAPABILITIES,
                process_key=self._process_key,
            )
        )

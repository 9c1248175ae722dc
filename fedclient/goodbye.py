"""The goodbye of a process that ends before the run does, so that nobody waits for it."""

import logging
import threading
from collections.abc import Callable, Sequence

from fedclient.connection import Connection
from fedclient.routes import Route
from fedclient.session import ServerSession
from fedrounds.errors import FederationError
from fedrounds.types import Leave, LeaveReason

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_MAIN_THREAD_S = 1.0
"""How long the main thread may take to end its step after a stop, and to say goodbye itself."""


class Goodbye:
    """Says once, for all ids of a session, that they leave: from any thread.

    `kept_order_ids` returns the orders whose updates are in the outbox. With `coming_back` the
    process is started again soon. The connection is a new one: a stop has closed the process's own.
    """

    def __init__(
        self,
        session: ServerSession,
        *,
        route: Route,
        kept_order_ids: Callable[[], Sequence[str]],
        coming_back: bool,
    ) -> None:
        self._session = session
        self._route = route
        self._kept_order_ids = kept_order_ids
        self._coming_back = coming_back
        self._lock = threading.Lock()
        self._begun = threading.Event()

    def say(self, reason: LeaveReason) -> None:
        """Leave the run, if that isn't done yet; a server that doesn't answer is let be."""
        with self._lock:
            if self._begun.is_set() or not self._session.is_open:
                return
            self._begun.set()
            said = Leave(
                reason=reason,
                coming_back=self._coming_back and reason is LeaveReason.STOPPED,
                kept_order_ids=tuple(self._kept_order_ids()),
            )
            connection = Connection(self._route)
            try:
                connection.leave(self._session.info.session_id, said, timeout_s=_TIMEOUT_S)
            except FederationError as error:
                logger.info("the server wasn't told that this process ends: %s", error)
            finally:
                connection.close()

    def say_stopped_soon(self) -> None:
        """Leave the run because of a stop, if the main thread is too busy to do it.

        It may be in a step of training that takes longer than the process is given to end.
        """
        if not self._begun.wait(_MAIN_THREAD_S):
            self.say(LeaveReason.STOPPED)

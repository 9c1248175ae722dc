"""Leaving a run before its end, so that the server doesn't wait for this process."""

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
"""The time after a stop in which the main thread may end its step and say goodbye itself."""


class Goodbye:
    """Leaves a run once, with all ids of a session; any thread may call it.

    `kept_order_ids` returns the orders whose updates are in the outbox. `coming_back`: the process
    will be started again soon. The call uses a new connection, since a stop closes the process's
    own.
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
        """Leave the run, unless that is done; a failure is logged and nothing more."""
        with self._lock:
            if self._begun.is_set() or not self._session.is_open:
                return
            self._begun.set()
            leave = Leave(
                reason=reason,
                coming_back=self._coming_back and reason is LeaveReason.STOPPED,
                kept_order_ids=tuple(self._kept_order_ids()),
            )
            connection = Connection(self._route)
            try:
                connection.leave(self._session.info.session_id, leave, timeout_s=_TIMEOUT_S)
            except FederationError as error:
                logger.info("the server wasn't told that this process ends: %s", error)
            finally:
                connection.close()

    def say_stopped_soon(self) -> None:
        """Leave the run because of a stop, if the main thread is too busy to do it.

        A training step may take longer than the time that the process has until it is killed.
        """
        if not self._begun.wait(_MAIN_THREAD_S):
            self.say(LeaveReason.STOPPED)

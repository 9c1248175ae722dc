"""Telling the server how far an order is, while the client works on it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from fedrounds.errors import FederationError, InvalidInput
from fedrounds.types import MAX_INCIDENTS, Counters, Incident, OrderEnd

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


class OrderAbandoned(Exception):
    """The server wants no update of this order any more; `order_end` is how the order ended."""

    def __init__(self, order_end: OrderEnd) -> None:
        super().__init__(order_end)
        self.order_end = order_end


class Stopped(Exception):
    """Somebody asked this process to end."""


class ProgressReporter:
    """Reports the counters every second from a thread of its own, as a context manager.

    `report(counters, incidents)` makes the call, with the incidents not reported yet and their
    numbers in the order, from 1; it returns how the order has ended, if it has. A report
    that fails is no harm: the next one says more. `stop` is set when the process is asked to end.
    """

    def __init__(
        self,
        report: Callable[[Counters, Sequence[tuple[int, Incident]]], OrderEnd | None],
        *,
        stop: threading.Event,
    ) -> None:
        self._report = report
        self._incidents: list[Incident] = []
        self._num_reported = 0
        self._stop = stop
        self._counters = Counters()
        self._order_end: OrderEnd | None = None
        self.began_at = time.monotonic()
        """When the work on the order began, on the monotonic clock."""
        self.loss: float | None = None
        """The loss of the last training step."""
        self._batches_since = self._answered_at = self.began_at
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        # A report under way ends first. A thread that comes back from gRPC while the interpreter
        # goes would take the whole process down with it.
        self._thread.join()

    @property
    def counters(self) -> Counters:
        """How far the order is."""
        return self._counters

    def add(
        self,
        *,
        bytes_received: int = 0,
        bytes_sent: int = 0,
        steps: int = 0,
        evaluation_batches: int = 0,
        replays: int = 0,
        loss: float | None = None,
    ) -> None:
        """Count what was done; `loss` is that of the training step just taken."""
        self.loss = self.loss if loss is None else loss
        before = self._counters
        self._counters = replace(
            before,
            bytes_received=before.bytes_received + bytes_received,
            bytes_sent=before.bytes_sent + bytes_sent,
            batches=before.batches + steps + evaluation_batches,
            evaluation_batches=before.evaluation_batches + evaluation_batches,
            replays=before.replays + replays,
        )

    def note(self, incident: Incident) -> None:
        """Say with the next report that something went wrong.

        The server takes so many of an order: the last place is that of the newest.
        """
        if len(self._incidents) < MAX_INCIDENTS:
            self._incidents.append(incident)
        elif self._num_reported < MAX_INCIDENTS:
            self._incidents[-1] = incident

    @property
    def unreported(self) -> list[tuple[int, Incident]]:
        """The incidents that the server hasn't acknowledged, with their numbers in the order."""
        numbered = list(enumerate(self._incidents, start=1))
        return numbered[self._num_reported :]

    @property
    def silent_s(self) -> float:
        """For how many seconds the server hasn't answered a report."""
        return time.monotonic() - self._answered_at

    def expect_batches(self, *, steps: int, evaluation_batches: int = 0) -> None:
        """Say how many steps and batches of evaluations the order takes; they begin now."""
        self._batches_since = time.monotonic()
        self._counters = replace(
            self._counters,
            batches_total=steps + evaluation_batches,
            evaluation_batches_total=evaluation_batches,
        )

    def remaining_s(self) -> float | None:
        """Return for how many seconds the batches go on at their pace; None before the first."""
        done, total = self._counters.batches, self._counters.batches_total
        if not done or total < done:
            return None
        return (time.monotonic() - self._batches_since) / done * (total - done)

    def raise_if_over(self) -> None:
        """Raise if there is no reason to go on with the order.

        Raises:
            OrderAbandoned: the server wants no update any more.
            Stopped: somebody asked the process to end.
        """
        if self._stop.is_set():
            raise Stopped
        if self._order_end is not None:
            raise OrderAbandoned(self._order_end)

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            try:
                incidents = self.unreported
                self._order_end = self._report(self._counters, incidents)
                self._answered_at = time.monotonic()
                self._num_reported += len(incidents)
                if self._order_end is not None:
                    return
            except InvalidInput as error:
                # Sent again they would be refused again, and the counters with them.
                logger.warning("the server doesn't take a report of what went wrong: %s", error)
                self._answered_at = time.monotonic()
                self._num_reported += len(incidents)
            except FederationError as error:
                logger.debug("a progress report failed: %s", error)

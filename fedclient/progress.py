"""Reports of an order's progress to the server, while the client works on it."""

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


class OrderEnded(Exception):
    """The server wants no update of this order any more; `order_end` is how the order ended."""

    def __init__(self, order_end: OrderEnd) -> None:
        super().__init__(order_end)
        self.order_end = order_end


class Stopped(Exception):
    """Somebody asked this process to end."""


class ProgressReporter:
    """A context manager that reports the counters every second from a thread of its own.

    `report(counters, incidents)` makes the call. `incidents` are those not reported yet, with their
    numbers in the order, from 1. It returns how the order has ended, or None. A failed report does
    no harm, since the next report has newer counters. `stop` is set when somebody asks the
    process to end.
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
        # Wait for a report under way: a thread that returns from gRPC while the interpreter shuts
        # down would crash the process.
        self._thread.join()

    @property
    def counters(self) -> Counters:
        """The progress of the order."""
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
        """Add to the counters; `loss` is that of the training step just taken."""
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
        """Add an incident to the next report.

        The server takes MAX_INCIDENTS of an order; beyond that the newest replaces the last.
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
        """Seconds since the server last answered a report."""
        return time.monotonic() - self._answered_at

    def expect_batches(self, *, steps: int, evaluation_batches: int = 0) -> None:
        """Set the numbers of training steps and evaluation batches of the order; they begin now."""
        self._batches_since = time.monotonic()
        self._counters = replace(
            self._counters,
            batches_total=steps + evaluation_batches,
            evaluation_batches_total=evaluation_batches,
        )

    def remaining_s(self) -> float | None:
        """Return the estimated seconds until the last batch; None before the first."""
        done, total = self._counters.batches, self._counters.batches_total
        if not done or total < done:
            return None
        return (time.monotonic() - self._batches_since) / done * (total - done)

    def raise_if_over(self) -> None:
        """Raise if there is no reason to go on with the order.

        Raises:
            OrderEnded: the server wants no update any more.
            Stopped: somebody asked the process to end.
        """
        if self._stop.is_set():
            raise Stopped
        if self._order_end is not None:
            raise OrderEnded(self._order_end)

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
                # Repeated, the incidents would be refused again, and the counters with them.
                logger.warning("the server doesn't take a report of what went wrong: %s", error)
                self._answered_at = time.monotonic()
                self._num_reported += len(incidents)
            except FederationError as error:
                logger.debug("a progress report failed: %s", error)

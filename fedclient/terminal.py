"""What a client shows while it works: a live view in a terminal, log lines elsewhere.

`Screen` holds what the process is doing. In a terminal the live view draws it twice a second, below
the log lines. Elsewhere a long order gets a log line now and then, as a sign of life. The code that
ends a piece of work logs its end.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from fedclient.progress import ProgressReporter
from fedrounds.cli import stderr_console
from fedrounds.types import WorkOrder

logger = logging.getLogger(__name__)

_FIRST_LINE_AFTER_S = 5.0
_NEXT_LINES_AFTER_S = 30.0
_SILENCE_S = 5.0
"""The server answers a report each second; a longer silence is shown."""


class Screen:
    """What the process is doing. The main thread writes it, another thread draws it."""

    def __init__(self) -> None:
        self._waits_for = "starting"
        self._trouble = ""
        self._order: tuple[WorkOrder, ProgressReporter] | None = None
        self._total_rounds = 0
        self._sent = (0, 0)
        """A round's number, and the number of updates that this process has sent in it."""
        self._spinner = Spinner("line")

    def wait_for(self, text: str) -> None:
        """Show what the process waits for, or does between two orders."""
        self._waits_for = text

    def show_trouble(self, text: str) -> None:
        """Show why the process can't go on; an empty text ends this."""
        self._trouble = text

    def expect_rounds(self, total_rounds: int) -> None:
        """Show the run's number of rounds from now on."""
        self._total_rounds = total_rounds

    def count_sent(self, round_number: int) -> None:
        """Count an update of this round that has got its receipt."""
        before = self._sent[1] if self._sent[0] == round_number else 0
        self._sent = (round_number, before + 1)

    @contextmanager
    def working_on(self, order: WorkOrder, progress: ProgressReporter) -> Iterator[None]:
        """Show the progress of an order until the block ends."""
        self._order = (order, progress)
        try:
            yield
        finally:
            self._order = None
            self._waits_for = (
                f"waiting for the next order; the last was of round {order.round_number}"
            )

    def render(self) -> RenderableType:
        """Return the live view's present content."""
        current = self._order
        if current is None:
            self._spinner.update(text=self._trouble or self._waits_for)
            return self._spinner
        order, progress = current
        counters = progress.counters
        row = Table.grid(padding=(0, 2))
        row.add_row(
            self.order_label(order),
            ProgressBar(total=counters.batches_total or 1, completed=counters.batches, width=30),
            self._trouble or describe_progress(progress),
        )
        return row

    def order_label(self, order: WorkOrder) -> str:
        """Return the client and round of an order, and the number of updates sent in this round."""
        of = f" of {self._total_rounds}" if self._total_rounds else ""
        sent = self._sent[1] if self._sent[0] == order.round_number else 0
        after = f", {sent} sent" if sent else ""
        return f"client {order.client_id}, round {order.round_number}{of}{after}"

    def line(self) -> str:
        """Return the progress of the present order as a line; empty if there is none."""
        current = self._order
        if current is None:
            return ""
        order, progress = current
        return f"{self.order_label(order)}: {self._trouble or describe_progress(progress)}"

    @property
    def working_since(self) -> float | None:
        """When the present order began, on the monotonic clock; None if there is none."""
        current = self._order
        return None if current is None else current[1].began_at


@contextmanager
def showing(screen: Screen) -> Iterator[Callable[[], None]]:
    """Show a screen on standard error until the block ends, or the yielded function is called."""
    console = stderr_console()
    if console.is_terminal:
        with Live(
            get_renderable=screen.render,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        ) as live:
            yield live.stop
        return
    ended = threading.Event()
    thread = threading.Thread(target=_log_long_orders, args=(screen, ended), daemon=True)
    thread.start()
    try:
        yield ended.set
    finally:
        ended.set()
        thread.join()


def describe_progress(progress: ProgressReporter) -> str:
    """Return the progress of an order in words: step, loss, remaining time.

    If the server hasn't answered for some seconds, the text says so.
    """
    done = _describe_counters(progress)
    if progress.silent_s < _SILENCE_S:
        return done
    return f"{done}; no answer from the server for {duration(progress.silent_s)}"


def _describe_counters(progress: ProgressReporter) -> str:
    counters = progress.counters
    if counters.bytes_sent:
        return f"sending the update, {counters.bytes_sent / 1e6:.1f} MB"
    if counters.work:
        words = [counters.work]
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4g}")
        if (left_s := progress.remaining_s()) is not None:
            words.append(f"{duration(left_s)} left")
        return ", ".join(words)
    if counters.bytes_received:
        return f"getting the global model, {counters.bytes_received / 1e6:.1f} MB"
    return "getting ready"


def duration(seconds: float) -> str:
    """Return a duration as 0:07, 12:30 or 1:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _log_long_orders(screen: Screen, ended: threading.Event) -> None:
    logged_order, next_at = None, 0.0
    while not ended.wait(1.0):
        began_at = screen.working_since
        if began_at != logged_order:
            logged_order, next_at = began_at, (began_at or 0.0) + _FIRST_LINE_AFTER_S
        if began_at is not None and time.monotonic() >= next_at and (line := screen.line()):
            logger.info("%s", line)
            next_at = time.monotonic() + _NEXT_LINES_AFTER_S

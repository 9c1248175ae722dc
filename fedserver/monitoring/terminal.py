"""The view of a run that goes on: a live view in a terminal, log lines otherwise.

A listener of events. Each time the live view is drawn it also looks at the open orders, to show how
far each client is.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedrounds.cli import stderr_console
from fedrounds.goals import Goal
from fedrounds.times import length_text
from fedrounds.types import IncidentKind
from fedserver.clients.open_orders import OpenOrder, OpenOrders
from fedserver.events import EventBus, log_event
from fedserver.phases import OrderState
from fedserver.records import Event, ModelEvaluation
from fedserver.reporting.round_report import incident_text

_NUM_CLIENTS_SHOWN = 20
_NUM_INCIDENTS_SHOWN = 5
_HIGHEST_ACCURACY = Goal("accuracy", is_highest=True)
_NUM_ROUNDS_TIMED = 10
"""The time that is left is estimated from the mean of so many last rounds."""


@contextmanager
def showing_progress(
    bus: EventBus,
    open_orders: OpenOrders,
    *,
    total_rounds: int,
    num_done: int,
    evaluated: Mapping[int, ModelEvaluation],
    spent_s: float,
    goal: Goal,
) -> Iterator[None]:
    """Show the run on standard error until the block ends.

    `num_done` rounds were done before, `evaluated` are the evaluations of their models (see
    `Store.good_evaluations`); they and failed attempts took `spent_s`. The best of them is
    that by the `goal`.
    """
    console = stderr_console()
    if not console.is_terminal:
        bus.subscribe(log_event)
        yield
        return
    view = LiveView(
        open_orders,
        total_rounds=total_rounds,
        num_done=num_done,
        evaluated=evaluated,
        spent_s=spent_s,
        goal=goal,
    )
    bus.subscribe(view.hear)
    with Live(
        get_renderable=view.render, console=console, refresh_per_second=2, redirect_stdout=False
    ):
        yield


class LiveView:
    """The newest events of the run, drawn when asked for."""

    def __init__(
        self,
        open_orders: OpenOrders,
        *,
        total_rounds: int,
        num_done: int = 0,
        evaluated: Mapping[int, ModelEvaluation] | None = None,
        spent_s: float = 0.0,
        goal: Goal = _HIGHEST_ACCURACY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_orders = open_orders
        self._clock = clock
        self._spent_s = spent_s
        # Of the rounds done lately; those before the server's start count as a single round of
        # their mean.
        self._took_s: deque[float] = deque(
            [spent_s / num_done] if num_done and spent_s else [], maxlen=_NUM_ROUNDS_TIMED
        )
        self._began_at: float | None = None
        self._last_done_at: float | None = None
        self._total_rounds = total_rounds
        self._num_done = num_done
        self._goal = goal
        self._evaluated: dict[int, Mapping[str, Any]] = {
            round_number: evaluation.numbers
            for round_number, evaluation in (evaluated or {}).items()
        }
        self._on_clients: Mapping[str, Any] = {}
        self._incidents: deque[str] = deque(maxlen=_NUM_INCIDENTS_SHOWN)

    def hear(self, event: Event) -> None:
        """Take an event into the view."""
        self._note_time(event)
        if event.is_incident:
            self._incidents.append(_incident_line(event))
            if event.kind == IncidentKind.MODEL_ROLLED_BACK and event.round_number is not None:
                self._num_done = event.round_number - 1
        elif event.kind == "round-done" and event.round_number is not None:
            self._num_done = event.round_number
        elif event.kind == "evaluated" and event.round_number is not None:
            self._evaluated[event.round_number] = event.fields
        elif event.kind == "evaluated-on-clients":
            self._on_clients = event.fields

    def render(self) -> RenderableType:
        """Draw the view."""
        lines: list[RenderableType] = [
            self._headline(),
            self._time_line(),
            self._evaluation_line(),
        ]
        if reported := self._on_clients:
            # An event of an earlier version doesn't name it.
            spread_of = reported.get("spread_of", "accuracy")
            form = ".2%" if spread_of == "accuracy" else ".4f"
            mean, worst, std = (
                format(reported[name], form) for name in ("mean", "worst_decile", "std")
            )
            lines.append(
                Text(
                    f"{spread_of} on clients: mean {mean}, worst tenth {worst}, std {std} after "
                    f"round {reported['of_round']}"
                )
            )
        orders = self._open_orders.list_all()
        if orders:
            lines.append(_client_table(orders))
        lines.extend(Text(f"! {line}", style="yellow") for line in self._incidents)
        return Group(*lines)

    def _headline(self) -> Text:
        current = self._open_orders.current
        if current is None:
            return Text(f"{self._num_done} of {self._total_rounds} rounds done", style="bold")
        states = self._open_orders.states()
        num_stored = sum(state is OrderState.STORED for state in states)
        attempt = current.record.attempt
        again = "" if attempt == 1 else f", attempt {attempt}"
        number, orders = current.record.round_number, self._open_orders.list_all()
        carried = sum(open_order.order.round_number < number for open_order in orders)
        return Text(
            f"round {number} of {self._total_rounds}{again}: {num_stored} of {len(states)} updates"
            + (f", {carried} of orders from earlier rounds" if carried else ""),
            style="bold",
        )

    def _note_time(self, event: Event) -> None:
        now = self._clock()
        if event.kind == "round-opened" and self._last_done_at is None:
            # Before it, clients were waited for.
            self._began_at = self._began_at or now
            self._last_done_at = now
        elif event.kind == "round-done":
            if self._last_done_at is not None:
                self._took_s.append(now - self._last_done_at)
            self._last_done_at = now

    def _time_line(self) -> Text:
        """Return the time that the rounds have taken, and an estimate of the time that is left."""
        now = self._clock()
        if self._began_at is None and self._open_orders.current is not None:
            # The round that goes on was opened before the server's start.
            self._began_at = now
        here_s = 0.0 if self._began_at is None else now - self._began_at
        text = f"elapsed {length_text(self._spent_s + here_s)}"
        num_left = self._total_rounds - self._num_done
        if self._took_s and num_left:
            mean_s = sum(self._took_s) / len(self._took_s)
            since_s = 0.0 if self._last_done_at is None else now - self._last_done_at
            # The round that goes on is over at some moment, however long it takes already.
            left_s = mean_s * (num_left - 1) + max(0.0, mean_s - since_s)
            text += f", about {length_text(left_s)} left"
        return Text(text)

    def _evaluation_line(self) -> Text:
        name = self._goal.name
        values = {
            number: float(numbers[name])
            for number, numbers in self._evaluated.items()
            if numbers.get(name) is not None
        }
        best = self._goal.best_of(values)
        if best is None:
            return Text(f"no {name} yet", style="dim")
        last = max(values)
        accuracy = self._evaluated[last].get("accuracy")
        also = "" if name == "accuracy" or accuracy is None else f"accuracy {accuracy:.2%}, "
        return Text(
            f"{also}{name} {_value_text(name, values[last])} after round {last}, best "
            f"{_value_text(name, values[best])} after {best}"
        )


def _value_text(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def _incident_line(event: Event) -> str:
    text = incident_text(event)
    return text if event.round_number is None else f"round {event.round_number}, {text}"


def _client_table(orders: list[OpenOrder]) -> Table:
    table = Table.grid(padding=(0, 2))
    # One process may serve hundreds of clients in turn: those at work are worth a line first.
    first = sorted(orders, key=_distance_from_work)[:_NUM_CLIENTS_SHOWN]
    for open_order in sorted(first, key=lambda open_order: open_order.order.client_id):
        total = open_order.counters.batches_total or 1
        is_done = open_order.state in (OrderState.STORED, OrderState.COUNTED)
        completed = total if is_done else open_order.counters.batches
        table.add_row(
            f"client {open_order.order.client_id}",
            ProgressBar(total=total, completed=completed, width=30),
            _activity_text(open_order),
        )
    if (hidden := len(orders) - _NUM_CLIENTS_SHOWN) > 0:
        table.add_row(f"and {hidden} more", "", "")
    return table


def _distance_from_work(open_order: OpenOrder) -> int:
    """Return 0 for an order that a client works on, 1 for a waiting order, 2 for an ended order."""
    if open_order.state is not OrderState.OPEN:
        return 2
    return 0 if open_order.handed_out_at is not None else 1


def _activity_text(open_order: OpenOrder) -> str:
    if open_order.state is not OrderState.OPEN:
        return (
            "update stored" if open_order.state is OrderState.STORED else open_order.state.lower()
        )
    if open_order.handed_out_at is None:
        return "not heard from yet"
    counters = open_order.counters
    if counters.bytes_sent:
        return f"uploading, {counters.bytes_sent / 1e6:.1f} MB sent"
    return counters.work or "getting ready"

"""A run's history as a person reads it: tables and pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from fedrounds.goals import LOWEST_LOSS, Goal
from fedserver.history import AttemptHistory, AttemptResult, attempts_that_asked, best_round
from fedserver.phases import OrderState, Phase
from fedserver.records import HeldUpdate, ModelEvaluation

V = TypeVar("V")

_MAX_CLASSES_LABELLED = 20
_DARK = 0.5
_GAP = 2
_STYLES = {"accuracy": ("o", "tab:blue"), "loss": (".", "tab:orange")}
"""The marker and the colour of a curve; the task's own metrics have another one."""


@dataclass(frozen=True)
class Column:
    """A column of a table; headings are one word, cells one line."""

    heading: str
    cells: Sequence[str]
    justify: JustifyMethod = "right"


def fitting_table(columns: Sequence[Column], *, title: str | None, max_width: int) -> Table:
    """Return a table of as many of the columns, from the left, as fit: nothing in it is cut.

    Those that don't fit are named below it.
    """
    widths = [max(map(len, (column.heading, *column.cells))) for column in columns]
    num_shown = len(columns)
    while num_shown > 1 and sum(widths[:num_shown]) + _GAP * (num_shown - 1) > max_width:
        num_shown -= 1
    hidden = ", ".join(column.heading for column in columns[num_shown:])
    table = _bare_table(title=title, caption=f"too narrow for: {hidden}" if hidden else None)
    for column in columns[:num_shown]:
        table.add_column(column.heading, justify=column.justify, no_wrap=True)
    for cells in zip(*(column.cells for column in columns[:num_shown]), strict=True):
        table.add_row(*cells)
    return table


def _bare_table(*, title: str | None, caption: str | None = None) -> Table:
    """Return a table without rows, with as little between its columns as can be."""
    return Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),
    )


def fact_table(lines: Sequence[tuple[str, str]]) -> Table:
    """Return a line for each fact, its name before it; long lines fold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def number_text(value: float | None) -> str:
    """Return a measured number with four decimals, nothing for None."""
    return "" if value is None else f"{value:.4f}"


def share_text(value: float | str | None) -> str:
    """Return a share as per cent, nothing for None; a share that isn't finite is its name."""
    return f"{100 * value:.3g} %" if isinstance(value, float) else value or ""


def round_table(history: Sequence[AttemptHistory], *, title: str, max_width: int) -> Table:
    """Return a table with one row for each attempt at a round.

    Where clients were asked: mean, worst tenth and standard deviation of the model's accuracies on
    them (of its losses, if targets aren't classes), as they reported when the next round began.
    """
    asked = attempts_that_asked(history)
    on_clients = [
        asked[attempt.round_number].client_evaluation
        if attempt.is_done and attempt.round_number in asked
        else None
        for attempt in history
    ]
    client_columns = [
        Column("clients", _cells(on_clients, lambda evaluation: evaluation.mean)),
        Column("worst", _cells(on_clients, lambda evaluation: evaluation.worst_decile)),
        Column("std", _cells(on_clients, lambda evaluation: evaluation.std)),
    ]
    compressions = [attempt.compression for attempt in history]
    compression_columns = [
        Column("sent", _cells(compressions, lambda compression: compression.ratio, share_text)),
        Column("lost", _cells(compressions, lambda compression: compression.error, share_text)),
    ]
    evaluations = [attempt.evaluation for attempt in history]
    accuracies = _cells(evaluations, lambda evaluation: evaluation.accuracy)
    return fitting_table(
        [
            Column("round", [_attempt_label(attempt) for attempt in history]),
            Column("phase", [phase_text(attempt.phase) for attempt in history], "left"),
            Column("counted", [_counted_text(attempt) for attempt in history]),
            # Where targets aren't classes there is none.
            *([Column("accuracy", accuracies)] if any(accuracies) else ()),
            Column("loss", _cells(evaluations, lambda evaluation: evaluation.loss)),
            *(client_columns if asked else ()),
            Column("incidents", [str(len(attempt.incidents) or "") for attempt in history]),
            Column("seconds", [_seconds_text(attempt.took_s) for attempt in history]),
            Column("model", [(attempt.model_digest or "")[:8] for attempt in history], "left"),
            *(compression_columns if any(compressions) else ()),
        ],
        title=title,
        max_width=max_width,
    )


def _cells(
    values: Sequence[V | None],
    number_of: Callable[[V], float | None],
    text_of: Callable[[float | None], str] = number_text,
) -> list[str]:
    """Return a number of each value as text, nothing where there is no value."""
    return [text_of(None if value is None else number_of(value)) for value in values]


def _attempt_label(attempt: AttemptHistory) -> str:
    again = f" ({attempt.attempt})" if attempt.attempt > 1 else ""
    return f"{attempt.round_number}{again}"


def _counted_text(attempt: AttemptHistory) -> str:
    num_counted = sum(update.verdict is OrderState.COUNTED for update in attempt.updates)
    return f"{num_counted} of {len(attempt.orders) + attempt.num_carried_over}"


def phase_text(phase: Phase) -> str:
    """Return a phase in words."""
    return phase.lower().replace("_", " ")


def held_table(held: Sequence[HeldUpdate], *, title: str) -> Table:
    """Return a table with one row for each update ever put in quarantine."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("order", "client", "round", "verdict", "why", "state", "bytes"):
        is_number = heading in ("client", "round", "bytes")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for update in held:
        table.add_row(
            update.order_id,
            str(update.client_id),
            str(update.round_number),
            update.verdict.lower(),
            str(update.refusal.evidence["kind"]),
            update.state.lower(),
            str(update.kept_bytes),
        )
    return table


def draw_curve(attempts: Sequence[AttemptResult], path: Path, *, goal: Goal = LOWEST_LOSS) -> None:
    """Draw accuracy and loss over the rounds into a PNG; on the clients too, if they were asked.

    The number of the `goal` is drawn too, and its best round is marked.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    evaluated = [
        (
            attempt.round_number,
            {name: _drawn(value) for name, value in attempt.evaluation.numbers.items()},
        )
        for attempt in attempts
        if attempt.is_done and attempt.evaluation is not None
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="round", ylabel="accuracy")
    loss_axes = axes.twinx()
    loss_axes.set_ylabel("loss")
    on_clients = [
        (round_number, asked.client_evaluation)
        for round_number, asked in attempts_that_asked(attempts).items()
        if round_number > 0 and asked.client_evaluation is not None
    ]
    if on_clients:
        numbers = [round_number for round_number, _ in on_clients]
        spread_axes = loss_axes if on_clients[-1][1].spread_of == "loss" else axes
        spread_axes.fill_between(
            numbers,
            [evaluation.quartile_1 for _, evaluation in on_clients],
            [evaluation.quartile_3 for _, evaluation in on_clients],
            color="tab:green",
            alpha=0.2,
            label="middle half of the clients",
        )
        mean = [evaluation.mean for _, evaluation in on_clients]
        spread_axes.plot(numbers, mean, marker=".", color="tab:green", label="mean of the clients")
        worst = [evaluation.worst_decile for _, evaluation in on_clients]
        spread_axes.plot(
            numbers, worst, ls="--", color="tab:red", label="worst tenth of the clients"
        )
    if evaluated:
        rounds = [round_number for round_number, _ in evaluated]
        for name, values in _curves(evaluated).items():
            on = loss_axes if name == "loss" else axes
            marker, color = _STYLES.get(name, ("s", "tab:purple"))
            on.plot(rounds, values, marker=marker, color=color, label=name)
        best = best_round(attempts, goal)
        if best is not None:
            axes.axvline(best, ls=":", color="gray", label=f"best by {goal}: round {best}")
        last = evaluated[-1][1].get(goal.name, math.nan)
        axes.set_title(f"held-out set: {goal.name} {last:.4g} after round {rounds[-1]}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
    if axes.has_data():
        axes.grid(alpha=0.3)
    else:
        axes.yaxis.set_visible(False)
        loss_axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _curves(evaluated: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, list[float]]:
    """Return each number over the evaluated rounds, without numbers that no round has."""
    curves = {
        name: [numbers.get(name, math.nan) for _, numbers in evaluated]
        for name in dict.fromkeys(name for _, numbers in evaluated for name in numbers)
    }
    return {name: values for name, values in curves.items() if not all(map(math.isnan, values))}


def _drawn(number: float | None) -> float:
    """Return a number to draw; a gap for a number that isn't finite."""
    return math.nan if number is None else number


def class_table(evaluation: ModelEvaluation, *, title: str) -> Table:
    """Return a row for each class: its accuracy, and how often each class was answered."""
    confusion, accuracies = evaluation.confusion, evaluation.class_accuracy
    assert confusion is not None
    assert accuracies is not None
    table = _bare_table(title=title)
    table.add_column("true", justify="right")
    table.add_column("accuracy", justify="right")
    for heading in _answers(confusion):
        table.add_column(heading, justify="right")
    for number, (row, accuracy) in enumerate(zip(confusion, accuracies, strict=True)):
        shown = [
            f"[bold]{count}[/bold]" if answer == number else str(count or "")
            for answer, count in enumerate(row[: len(_answers(confusion))])
        ]
        table.add_row(str(number), number_text(accuracy), *shown)
    return table


def draw_confusion(confusion: Sequence[Sequence[int]], path: Path, *, title: str) -> None:
    """Draw a confusion matrix into a PNG, each row as shares of its true class.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    headings = _answers(confusion)
    rows = [row[: len(headings)] for row in confusion]
    shares = [[count / max(1, sum(row)) for count in row] for row in rows]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="answered", ylabel="true class", title=title)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    if len(rows) <= _MAX_CLASSES_LABELLED:
        axes.set_xticks(range(len(headings)), headings)
        axes.set_yticks(range(len(rows)))
        for true, row in enumerate(rows):
            for answer, count in enumerate(row):
                if count:
                    color = "white" if shares[true][answer] > _DARK else "black"
                    axes.text(
                        answer, true, str(count), ha="center", va="center", color=color, size=8
                    )
    figure.savefig(path, dpi=120, format="png")


def _answers(confusion: Sequence[Sequence[int]]) -> list[str]:
    """Return the headings of a confusion matrix; answers that name no class only if there are."""
    has_others = any(row[-1] for row in confusion)
    return [str(number) for number in range(len(confusion))] + ["none"] * has_others


def _seconds_text(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"

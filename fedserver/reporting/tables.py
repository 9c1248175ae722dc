"""A run's history as a person reads it: tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from fedserver.models.client_metrics import told_of_models
from fedserver.records import HeldUpdate

History = Sequence[Mapping[str, Any]]

_MAX_CLASSES_LABELLED = 20
_DARK = 0.5
_GAP = 2


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
    widths = [max(map(len, (one.heading, *one.cells))) for one in columns]
    num_shown = len(columns)
    while num_shown > 1 and sum(widths[:num_shown]) + _GAP * (num_shown - 1) > max_width:
        num_shown -= 1
    hidden = ", ".join(one.heading for one in columns[num_shown:])
    table = _bare_table(title=title, caption=f"too narrow for: {hidden}" if hidden else None)
    for one in columns[:num_shown]:
        table.add_column(one.heading, justify=one.justify, no_wrap=True)
    for cells in zip(*(one.cells for one in columns[:num_shown]), strict=True):
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
    """Return a line for each fact, its name before it; long ones fold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def round_table(history: History, *, title: str, max_width: int) -> Table:
    """Return a table with one row for each attempt at a round.

    Where clients were asked: mean, worst tenth and standard deviation of the model's accuracies on
    them, as they were told when the next round began.
    """
    again = [f" ({one['attempt']})" if one["attempt"] > 1 else "" for one in history]
    evaluations = [one["evaluation"] or {} for one in history]
    counted = [sum(one["verdict"] == "COUNTED" for one in entry["updates"]) for entry in history]
    told_by = told_of_models(history)
    told = [
        told_by[one["round"]]["client_evaluation"]
        if one["phase"] == "DONE" and one["round"] in told_by
        else {}
        for one in history
    ]
    on_clients = [
        Column(heading, [number_text(one.get(name)) for one in told])
        for heading, name in (("clients", "mean"), ("worst", "worst_decile"), ("std", "std"))
        if told_by
    ]
    sent = [one["compression"] or {} for one in history]
    packed = [
        Column("sent", [share_text(one.get("ratio")) for one in sent]),
        Column("lost", [share_text(one.get("error")) for one in sent]),
    ]
    return fitting_table(
        [
            Column("round", [f"{one['round']}{n}" for one, n in zip(history, again, strict=True)]),
            Column("phase", [phase_text(one) for one in history], "left"),
            Column(
                "counted",
                [
                    f"{n} of {len(one['cohort']) + one['carried_over']}"
                    for one, n in zip(history, counted, strict=True)
                ],
            ),
            Column("accuracy", [number_text(one.get("accuracy")) for one in evaluations]),
            Column("loss", [number_text(one.get("loss")) for one in evaluations]),
            *on_clients,
            Column("incidents", [str(len(one["incidents"]) or "") for one in history]),
            Column("seconds", [_seconds(one) for one in history]),
            Column("model", [(one["model_digest"] or "")[:8] for one in history], "left"),
            *(packed if any(sent) else ()),
        ],
        title=title,
        max_width=max_width,
    )


def phase_text(attempt: Mapping[str, Any]) -> str:
    """Return an attempt's phase in words."""
    return str(attempt["phase"]).lower().replace("_", " ")


def models_by_round(history: History) -> dict[int, str]:
    """Return the digest of the model that each round is done with; one rolled back isn't one."""
    return {one["round"]: one["model_digest"] for one in history if one["phase"] == "DONE"}


def best_round(history: History) -> int | None:
    """Return the number of the round with the highest accuracy, the earliest of equals."""
    evaluated = [
        (entry["evaluation"]["accuracy"], -entry["round"])
        for entry in history
        if entry["evaluation"] and entry["phase"] == "DONE"
    ]
    return -max(evaluated)[1] if evaluated else None


def held_table(held: Sequence[HeldUpdate], *, title: str) -> Table:
    """Return a table with one row for each update ever put in quarantine."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("order", "client", "round", "verdict", "why", "state", "bytes"):
        is_number = heading in ("client", "round", "bytes")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for one in held:
        table.add_row(
            one.order_id,
            str(one.client_id),
            str(one.round_number),
            one.verdict.lower(),
            str(one.refusal.evidence["kind"]),
            one.state.lower(),
            str(one.kept_bytes),
        )
    return table


def draw_curve(history: History, path: Path) -> None:
    """Draw accuracy and loss over the rounds into a PNG; on the clients too, if they were asked.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    evaluated = [
        (entry["round"], entry["evaluation"]["accuracy"], entry["evaluation"]["loss"])
        for entry in history
        if entry["evaluation"] and entry["phase"] == "DONE"
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="round", ylabel="accuracy")
    loss_axes = axes.twinx()
    loss_axes.set_ylabel("loss")
    told = {number: one["client_evaluation"] for number, one in told_of_models(history).items()}
    told.pop(0, None)
    if told:
        numbers, summaries = list(told), list(told.values())
        low, high, mean, worst = (
            [one[name] for one in summaries]
            for name in ("quartile_1", "quartile_3", "mean", "worst_decile")
        )
        axes.fill_between(
            numbers, low, high, color="tab:green", alpha=0.2, label="middle half of the clients"
        )
        axes.plot(numbers, mean, marker=".", color="tab:green", label="mean of the clients")
        axes.plot(numbers, worst, ls="--", color="tab:red", label="worst tenth of the clients")
    if evaluated:
        rounds, accuracies, losses = zip(*evaluated, strict=True)
        axes.plot(rounds, accuracies, marker="o", color="tab:blue", label="accuracy")
        loss_axes.plot(rounds, losses, marker=".", color="tab:orange", label="loss")
        axes.set_title(f"held-out set: {accuracies[-1]:.2%} after round {rounds[-1]}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def class_table(evaluation: Mapping[str, Any], *, title: str) -> Table:
    """Return a row for each class: its accuracy, and how often which class was answered."""
    confusion, accuracies = evaluation["confusion"], evaluation["class_accuracy"]
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


def draw_confusion(evaluation: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw the confusion matrix into a PNG, each row as shares of its true class.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    headings = _answers(evaluation["confusion"])
    rows = [row[: len(headings)] for row in evaluation["confusion"]]
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
                    axes.text(answer, true, count, ha="center", va="center", color=color, size=8)
    figure.savefig(path, dpi=120, format="png")


def _answers(confusion: Sequence[Sequence[int]]) -> list[str]:
    """Return the headings of a confusion matrix; answers that name no class only if there are."""
    has_others = any(row[-1] for row in confusion)
    return [str(number) for number in range(len(confusion))] + ["none"] * has_others


def number_text(value: float | None) -> str:
    """Return a measured number with four decimals, nothing for None."""
    return "" if value is None else f"{value:.4f}"


def share_text(value: float | str | None) -> str:
    """Return a share as per cent, nothing for None; one that isn't finite is kept by its name."""
    return f"{100 * value:.3g} %" if isinstance(value, float) else value or ""


def _seconds(entry: Mapping[str, Any]) -> str:
    return "" if entry["took_s"] is None else f"{entry['took_s']:.2f}"

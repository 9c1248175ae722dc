"""A run's history as a person reads it: tables and pictures."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedserver.records import HeldUpdate

History = Sequence[Mapping[str, Any]]

_MAX_CLASSES_LABELLED = 20
_DARK = 0.5


def round_table(history: History, *, title: str) -> Table:
    """Return a table with one row for each attempt at a round."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("round", "phase", "counted", "accuracy", "loss", "seconds", "incidents"):
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for entry in history:
        evaluation = entry["evaluation"] or {}
        again = "" if entry["attempt"] == 1 else f" ({entry['attempt']})"
        num_counted = sum(update["verdict"] == "COUNTED" for update in entry["updates"])
        table.add_row(
            f"{entry['round']}{again}",
            entry["phase"].lower(),
            f"{num_counted} of {len(entry['cohort'])}",
            _number(evaluation.get("accuracy")),
            _number(evaluation.get("loss")),
            _seconds(entry),
            str(len(entry["incidents"]) or ""),
            (entry["model_digest"] or "")[:8],
        )
    return table


def best_round(history: History) -> int | None:
    """Return the number of the round with the highest accuracy, the earliest of equals."""
    evaluated = [
        (entry["evaluation"]["accuracy"], -entry["round"])
        for entry in history
        if entry["evaluation"]
    ]
    return -max(evaluated)[1] if evaluated else None


def incident_lines(history: History) -> list[str]:
    """Return a line for each incident, in order."""
    lines = []
    for entry in history:
        for incident in entry["incidents"]:
            rest = " ".join(
                f"{key}={value}"
                for key, value in incident.items()
                if key not in {"kind", "at", "client"} and value is not None
            )
            who = "" if incident["client"] is None else f" client {incident['client']}"
            lines.append(
                f"{incident['at'][:19]} round {entry['round']}{who}: {incident['kind']} {rest}"
            )
    return lines


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
    """Draw accuracy and loss over the rounds into a PNG.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    evaluated = [
        (entry["round"], entry["evaluation"]["accuracy"], entry["evaluation"]["loss"])
        for entry in history
        if entry["evaluation"]
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="round", ylabel="accuracy")
    loss_axes = axes.twinx()
    loss_axes.set_ylabel("loss")
    if evaluated:
        rounds, accuracies, losses = zip(*evaluated, strict=True)
        axes.plot(rounds, accuracies, marker="o", color="tab:blue", label="accuracy")
        loss_axes.plot(rounds, losses, marker=".", color="tab:orange", label="loss")
        axes.set_title(f"held-out set: {accuracies[-1]:.2%} after round {rounds[-1]}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def class_table(evaluation: Mapping[str, Any], *, title: str) -> Table:
    """Return a row for each class: its accuracy, and how often which class was answered."""
    confusion, accuracies = evaluation["confusion"], evaluation["class_accuracy"]
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("true class", justify="right")
    table.add_column("accuracy", justify="right")
    for heading in _answers(confusion):
        table.add_column(heading, justify="right")
    for number, (row, accuracy) in enumerate(zip(confusion, accuracies, strict=True)):
        shown = [
            f"[bold]{count}[/bold]" if answer == number else str(count or "")
            for answer, count in enumerate(row[: len(_answers(confusion))])
        ]
        table.add_row(str(number), _number(accuracy), *shown)
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
    figure.savefig(path, dpi=120)


def _answers(confusion: Sequence[Sequence[int]]) -> list[str]:
    """Return the headings of a confusion matrix; answers that name no class only if there are."""
    has_others = any(row[-1] for row in confusion)
    return [str(number) for number in range(len(confusion))] + ["none"] * has_others


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _seconds(entry: Mapping[str, Any]) -> str:
    if not entry["finished_at"]:
        return ""
    took = datetime.fromisoformat(entry["finished_at"]) - datetime.fromisoformat(
        entry["started_at"]
    )
    return f"{took.total_seconds():.2f}"

"""A client's diagnosis as a person reads it: in words, as tables, as a picture."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fedrounds.diagnosis.as_json import read_diagnosis
from fedrounds.diagnosis.text import (
    EXPERIMENT_HEADINGS,
    TREND_HEADINGS,
    Rows,
    experiment_rows,
    facts,
    trend_rows,
    verdict,
)
from fedrounds.diagnosis.values import Diagnosis
from fedserver.history import AttemptHistory
from fedserver.records import Event
from fedserver.reporting.tables import Column, fact_table, fitting_table

NUM_SHOWN_WHOLE = 3
"""Of a round's diagnoses; the others have a sentence each, as all incidents do."""


def diagnosed_incidents(attempt: AttemptHistory) -> list[Event]:
    """Return those of an attempt's incidents that hold a diagnosis."""
    return [incident for incident in attempt.incidents if "diagnosis" in incident.fields]


def diagnosis_report(incident: Event, *, max_width: int) -> Iterator[RenderableType]:
    """Yield a diagnosis for printing: the verdict, the facts, experiments and trend."""
    diagnosis = read_diagnosis(incident.fields)
    yield Text(f"\nclient {incident.client_id}: {verdict(diagnosis)}", style="bold")
    yield fact_table(facts(diagnosis))
    for title, headings, rows in (
        ("The same steps again, with one thing changed", EXPERIMENT_HEADINGS, experiment_rows),
        ("The steps before", TREND_HEADINGS, trend_rows),
    ):
        if lines := rows(diagnosis):
            yield Text(title)
            yield fitting_table(_columns(headings, lines), title=None, max_width=max_width)


def draw_diagnosis(incident: Event, path: Path, *, title: str) -> None:
    """Draw a diagnosis's trend and what its experiments showed into a PNG.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    diagnosis = read_diagnosis(incident.fields)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {diagnosis.cause} at step {diagnosis.step}")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True)
    for axes, values, what in (
        (loss_axes, [point.loss for point in diagnosis.trend], "loss"),
        (norm_axes, [point.grad_norm for point in diagnosis.trend], "gradient norm"),
    ):
        _draw_trend(axes, diagnosis, values)
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    if any(0 < point.grad_norm < math.inf for point in diagnosis.trend):
        norm_axes.set_yscale("log")
    norm_axes.set_xlabel("step")
    norm_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    results = [
        " ".join(word for word in (name, value, "-", result) if word)
        for name, value, result, _ in experiment_rows(diagnosis)
    ]
    if results:
        figure.supxlabel("\n".join(results), fontsize=9, family="monospace")
    figure.savefig(path, dpi=120, format="png")


def _draw_trend(axes: Any, diagnosis: Diagnosis, values: Sequence[float]) -> None:  # noqa: ANN401
    """Draw numbers over the steps; those that aren't finite are crosses at the top."""
    steps = [point.step for point in diagnosis.trend]
    axes.plot(steps, [v if math.isfinite(v) else math.nan for v in values], marker="o")
    lost = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if lost:
        high = axes.get_xaxis_transform()
        axes.plot(
            lost, [0.95] * len(lost), "x", color="tab:red", transform=high, label="not finite"
        )
    axes.axvline(diagnosis.step, color="tab:red", linestyle="--", label="the bad step")
    axes.legend(loc="upper left")


def _columns(headings: Sequence[str], rows: Rows) -> list[Column]:
    """Return a table's columns, words to the left and numbers to the right."""
    return [
        Column(heading, [row[number] for row in rows], "left" if heading in _WORDS else "right")
        for number, heading in enumerate(headings)
    ]


_WORDS = {"experiment", "result", "step"}

"""How good a model is on each client, as a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedserver.reporting.tables import Column, fitting_table, number_text

_MAX_CLIENTS_LABELLED = 40


def client_table(asked: Mapping[str, Any], *, title: str, max_width: int) -> Table:
    """Return a row for each client that said how good a model is, the worst first.

    `asked` is the attempt at a round whose clients were asked about its base.
    """
    told = _told(asked)
    metrics = [one["metrics"] for one in told]
    measured = [int(one["metrics"].get("global_examples", one["num_examples"])) for one in told]
    return fitting_table(
        [
            Column("client", [str(one["client"]) for one in told]),
            Column("accuracy", [number_text(one["global_accuracy"]) for one in metrics]),
            Column("loss", [number_text(one.get("global_loss")) for one in metrics]),
            Column("measured", [str(one) for one in measured]),
            Column("trained", [str(one["num_examples"]) for one in told]),
        ],
        title=title,
        max_width=max_width,
    )


def draw_clients(asked: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw the clients' accuracies into a PNG, ascending, with mean, quartiles and worst tenth.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    told, summary = _told(asked), asked["client_evaluation"]
    accuracies = [one["metrics"]["global_accuracy"] for one in told]
    places = range(len(told))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="clients, the worst first", ylabel="accuracy", title=title)
    axes.set_ylim(0, 1)
    axes.bar(places, accuracies, width=0.9 if len(told) <= _MAX_CLIENTS_LABELLED else 1.0)
    if len(told) <= _MAX_CLIENTS_LABELLED:
        axes.set_xticks(places, [str(one["client"]) for one in told])
    else:
        # Their places, which would be taken for the clients' ids.
        axes.set_xticks([])
    axes.axhspan(
        summary["quartile_1"],
        summary["quartile_3"],
        color="tab:green",
        alpha=0.2,
        label="middle half",
    )
    axes.axhline(summary["mean"], color="tab:green", label=f"mean {summary['mean']:.2%}")
    axes.axhline(
        summary["worst_decile"],
        color="tab:red",
        ls="--",
        label=f"worst tenth {summary['worst_decile']:.2%}",
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120, format="png")


def _told(asked: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the updates that counted and told, by accuracy, then client."""
    told = [
        one
        for one in asked["updates"]
        if one["verdict"] == "COUNTED"
        and "global_accuracy" in one["metrics"]
        # In an asynchronous run others began with an earlier model, and told of that.
        and one["staleness"] == 0
    ]
    return sorted(told, key=lambda one: (one["metrics"]["global_accuracy"], one["client"]))

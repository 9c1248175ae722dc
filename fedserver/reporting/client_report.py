"""How good a model is on each client, as a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fedserver.history import AttemptHistory
from fedserver.phases import OrderState
from fedserver.records import ClientEvaluation
from fedserver.reporting.tables import Column, fitting_table, number_text

_MAX_CLIENTS_LABELLED = 40


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What one client reports of the base model; `num_measured` examples of its own."""

    client_id: int
    accuracy: float | None
    loss: float | None
    num_measured: int
    num_trained: int

    @property
    def compared_by(self) -> float:
        """The accuracy, or the loss where there is none."""
        number = self.loss if self.accuracy is None else self.accuracy
        assert number is not None
        return number


def client_evaluation_text(evaluation: ClientEvaluation) -> str:
    """Return an evaluation in a sentence: how good, how even, and on what that was measured."""
    share = evaluation.holdout
    others = "".join(
        f", {name} {'-' if value is None else format(value, '.4f')}"
        + (" as mean over clients" if name in evaluation.means_over_clients else "")
        for name, value in evaluation.metrics.items()
    )
    measured = f"on {share:.0%} of each one's examples, held out" if share else "on what they train"
    return (
        f"{evaluation.spread_of}: mean {evaluation.mean:.4f}, worst tenth "
        f"{evaluation.worst_decile:.4f}, standard deviation {evaluation.std:.4f}, quartiles "
        f"{evaluation.quartile_1:.4f} to {evaluation.quartile_3:.4f}{others} ({measured})"
    )


def client_table(asked: AttemptHistory, *, title: str, max_width: int) -> Table:
    """Return a row for each client that reports how good a model is, the worst first.

    `asked` is the attempt at a round whose clients evaluated its base model.
    """
    measured = _measured_by_clients(asked)
    accuracies = [number_text(client.accuracy) for client in measured]
    return fitting_table(
        [
            Column("client", [str(client.client_id) for client in measured]),
            *([Column("accuracy", accuracies)] if any(accuracies) else []),
            Column("loss", [number_text(client.loss) for client in measured]),
            Column("measured", [str(client.num_measured) for client in measured]),
            Column("trained", [str(client.num_trained) for client in measured]),
        ],
        title=title,
        max_width=max_width,
    )


def draw_clients(asked: AttemptHistory, path: Path, *, title: str) -> None:
    """Draw the clients' accuracies or losses into a PNG, with mean, quartiles and worst tenth.

    Raises:
        ImportError: the extra `plot` isn't installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    measured, summary = _measured_by_clients(asked), asked.client_evaluation
    assert summary is not None
    positions = range(len(measured))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="clients, the worst first", ylabel=summary.spread_of, title=title
    )
    if summary.spread_of == "accuracy":
        axes.set_ylim(0, 1)
    is_labelled = len(measured) <= _MAX_CLIENTS_LABELLED
    axes.bar(
        positions,
        [client.compared_by for client in measured],
        width=0.9 if is_labelled else 1.0,
    )
    if is_labelled:
        axes.set_xticks(positions, [str(client.client_id) for client in measured])
    else:
        # Positions would be taken for the clients' ids.
        axes.set_xticks([])
    axes.axhspan(
        summary.quartile_1,
        summary.quartile_3,
        color="tab:green",
        alpha=0.2,
        label="middle half",
    )
    axes.axhline(summary.mean, color="tab:green", label=f"mean {summary.mean:.4g}")
    axes.axhline(
        summary.worst_decile,
        color="tab:red",
        ls="--",
        label=f"worst tenth {summary.worst_decile:.4g}",
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120, format="png")


def _measured_by_clients(asked: AttemptHistory) -> list[_Measured]:
    """Return the reports of the clients whose updates counted, the worst first, then by client."""
    measured = []
    for update in asked.updates:
        accuracy = update.metrics.get("global_accuracy")
        loss = update.metrics.get("global_loss")
        is_measured = accuracy is not None or loss is not None
        # In an asynchronous run a stale update began with an earlier model, and measured that.
        if update.verdict is OrderState.COUNTED and not update.staleness and is_measured:
            measured.append(
                _Measured(
                    client_id=update.client_id,
                    accuracy=None if accuracy is None else float(accuracy),
                    loss=None if loss is None else float(loss),
                    num_measured=int(update.metrics.get("global_examples", update.num_examples)),
                    num_trained=update.num_examples,
                )
            )
    if has_accuracy := any(client.accuracy is not None for client in measured):
        measured = [client for client in measured if client.accuracy is not None]
    sign = 1 if has_accuracy else -1
    return sorted(measured, key=lambda client: (sign * client.compared_by, client.client_id))

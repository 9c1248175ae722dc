"""`python -m fedclient partitions`: who would hold what under a partitioning."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shared.cli import Settings, parse
from shared.data import load_images, partition_indices
from shared.errors import InvalidInput

_TASKS = ("mnist-sample", "mnist", "fashion-mnist")


class PartitionsSettings(Settings):
    """Show how many examples of each label every client would hold, and draw it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedclient partitions")

    task: str = Field(default="mnist-sample", description=f"one of {', '.join(_TASKS)}")
    data_root: Path | None = Field(default=None, description="folder of the data sets")
    partition: str = Field(default="iid", description="iid, shards, classes, dirichlet, quantity")
    num_partitions: int = Field(default=10, ge=1, description="number of clients")
    alpha: float | None = Field(default=None, gt=0, description="spread of partition dirichlet")
    shards_per_client: int | None = Field(default=None, ge=1, description="of partition shards")
    classes_per_client: int | None = Field(default=None, ge=1, description="of partition classes")
    seed: int = Field(default=0, ge=0, description="the run's seed")
    out: Path | None = Field(default=None, description="draw it into this PNG (extra: plot)")


def run(argv: list[str]) -> None:
    """Print the histogram of labels per client; with --out, draw it."""
    settings = parse(PartitionsSettings, argv)
    if settings.task not in _TASKS:
        raise InvalidInput(f"--task is {settings.task!r}; choose one of {', '.join(_TASKS)}")
    labels = load_images(
        settings.task, "train", data_root=settings.data_root, may_download=True
    ).labels
    parameters = settings.model_dump(
        include={"alpha", "shards_per_client", "classes_per_client"}, exclude_none=True
    )
    shares = partition_indices(
        labels,
        scheme=settings.partition,
        num_partitions=settings.num_partitions,
        seed=settings.seed,
        parameters=parameters,
    )
    num_labels = int(labels.max()) + 1
    counts = np.stack([np.bincount(labels[share], minlength=num_labels) for share in shares])
    Console().print(_table(counts, title=f"{settings.task}, {settings.partition}"))
    if settings.out is not None:
        _draw(counts, settings.out, title=f"{settings.task}, {settings.partition} {parameters}")
        print(f"drawn into {settings.out}")


def _table(counts: NDArray[np.int64], *, title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("client", "examples", *(str(label) for label in range(counts.shape[1]))):
        table.add_column(heading, justify="right", no_wrap=True)
    for client_id, row in enumerate(counts):
        table.add_row(str(client_id), str(row.sum()), *(str(count or "") for count in row))
    return table


def _draw(counts: NDArray[np.int64], path: Path, *, title: str) -> None:
    """Draw one bar a client, stacked by label; counts are [num_clients, num_labels]."""
    try:
        from matplotlib import colormaps  # noqa: PLC0415
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            "--out needs matplotlib; install it with: python -m pip install 'fedrounds[plot]'"
        ) from error
    figure = Figure(figsize=(8, 0.3 * len(counts) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot(xlabel="examples", ylabel="client", title=title)
    clients = np.arange(len(counts))
    begin = np.zeros(len(counts))
    colors = colormaps["tab10" if counts.shape[1] <= 10 else "viridis"]
    for label in range(counts.shape[1]):
        color = colors(label if counts.shape[1] <= 10 else label / counts.shape[1])
        axes.barh(clients, counts[:, label], left=begin, color=color, label=str(label))
        begin += counts[:, label]
    axes.invert_yaxis()
    axes.set_yticks(clients[:: max(1, len(counts) // 25)])
    figure.legend(title="label", loc="outside right upper")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"can't draw into {path}: {error}; choose another --out") from error

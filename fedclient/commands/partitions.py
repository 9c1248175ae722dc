"""`python -m fedclient partitions`: the labels of each client under a partitioning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from fedclient.settings import PartitionsSettings
from fedrounds.data import partition_indices, validate_scheme
from fedrounds.errors import InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Examples, Partition, Task, count_examples, has_numbers

_FEW_LABELS = 10


def run(settings: PartitionsSettings) -> int:
    """Print the histogram of labels per client; with --out, draw it. Return the exit code."""
    parameters = settings.scheme_parameters
    task = find_task(settings.task)
    shares = _labels_of_shares(task, settings, parameters)
    num_labels = max((int(labels.max(initial=-1)) + 1 for labels in shares), default=0)
    counts = np.stack([np.bincount(labels, minlength=num_labels) for labels in shares])
    title = f"{settings.task}, {settings.partition}"
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(_table(counts, max_width=console.width))
    if settings.out is not None:
        _draw(
            counts,
            settings.out,
            title=" ".join([title, *(f"{name} {value}" for name, value in parameters.items())]),
        )
        print(f"drawn into {settings.out}")
    return 0


def _labels_of_shares(
    task: Task, settings: PartitionsSettings, parameters: Mapping[str, float]
) -> list[NDArray[np.int64]]:
    """Return each partition's labels, int64 [its examples].

    If the task has no load_labels, it loads every share, and the targets are the labels.
    """
    if task.load_labels is not None:
        labels = task.load_labels(settings.data_root)
        shares = partition_indices(
            labels,
            scheme=settings.partition,
            num_partitions=settings.num_partitions,
            seed=settings.seed,
            parameters=parameters,
        )
        return [labels[share] for share in shares]
    validate_scheme(settings.partition, parameters)
    shares_of_labels = []
    for index in range(settings.num_partitions):
        partition = Partition(
            scheme=settings.partition,
            num_partitions=settings.num_partitions,
            index=index,
            seed=settings.seed,
            parameters=parameters,
        )
        request = DataRequest(data_root=settings.data_root, partition=partition)
        shares_of_labels.append(_targets_as_labels(task, task.load_train(request), index))
    return shares_of_labels


def _targets_as_labels(task: Task, examples: Examples, index: int) -> NDArray[np.int64]:
    if task.loss is not None and isinstance(examples, TensorDataset):
        labels = examples.tensors[1].numpy()
    else:
        if task.loss is None or isinstance(examples, DataLoader) or not has_numbers(examples):
            raise InvalidInput(
                f"task {task.name!r} doesn't say which part of an example is its label; give the "
                "Task load_labels, which says what a partitioning goes by"
            )
        num_examples = count_examples(task, examples, loaded_by="load_train")
        labels = np.array([np.asarray(examples[number][1]) for number in range(num_examples)])
    if len(labels) and (labels.ndim != 1 or labels.dtype.kind not in "biu" or labels.min() < 0):
        raise InvalidInput(
            f"the targets of task {task.name!r} are no labels to count: each must be one whole "
            f"number from 0, but those of partition {index} have dtype {labels.dtype} and shape "
            f"{list(labels.shape)}; give the Task load_labels, which says what a partitioning "
            "goes by"
        )
    return labels.astype(np.int64).reshape(-1)


def _table(counts: NDArray[np.int64], *, max_width: int) -> Table:
    """Return a row for each client; where not all labels fit, the commonest stands for them."""
    num_labels = counts.shape[1]
    rows = [[str(count or "") for count in row] for row in counts]
    headings = [str(label) for label in range(num_labels)]
    width = sum(max(map(len, column)) + 1 for column in zip(headings, *rows, strict=True))
    if width + len("client examples ") > max_width:
        headings = ["labels", "commonest", "share"]
        rows = [
            [f"{np.count_nonzero(row)} of {num_labels}", f"{row.argmax()}", _share(row)]
            for row in counts
        ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("client", "examples", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for client_id, (row, cells) in enumerate(zip(counts, rows, strict=True)):
        table.add_row(str(client_id), str(row.sum()), *cells)
    return table


def _share(row: NDArray[np.int64]) -> str:
    return f"{row.max() / row.sum():.0%}" if row.sum() else ""


def _draw(counts: NDArray[np.int64], path: Path, *, title: str) -> None:
    """Draw a bar for each client, stacked by label; counts is [num_clients, num_labels]."""
    try:
        from matplotlib import colormaps  # noqa: PLC0415
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.cm import ScalarMappable  # noqa: PLC0415
        from matplotlib.colors import Normalize  # noqa: PLC0415
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
    num_labels = counts.shape[1]
    has_few = num_labels <= _FEW_LABELS
    colors = colormaps["tab10" if has_few else "viridis"]
    for label in range(num_labels):
        color = colors(label if has_few else label / num_labels)
        axes.barh(clients, counts[:, label], left=begin, color=color, label=str(label))
        begin += counts[:, label]
    axes.invert_yaxis()
    axes.set_yticks(clients[:: max(1, len(counts) // 25)])
    if has_few:
        figure.legend(title="label", loc="outside right upper")
    else:
        scale = ScalarMappable(Normalize(0, num_labels - 1), colors)
        figure.colorbar(scale, ax=axes, label="label")
    try:
        figure.savefig(path, dpi=120, format="png")
    except (OSError, ValueError) as error:
        raise InvalidInput(f"can't draw into {path}: {error}; choose another --out") from error

"""A Task: a model, its data and its loss, looked up by its name.

Built in are `mnist-sample` (bundled, needs no network), `mnist`, `fashion-mnist`, `text` and
`tabular`. Your own lives in your own module, is named `package.module:attribute`, and is the
same object on the server (which builds the model and holds the test set) and on every client:

    my_task = Task(
        name="my-task",
        build_model=lambda: nn.Linear(20, 2),
        load_train=lambda request: MyDataset(request.data_root),
        load_test=lambda data_root: None,
        loss=F.cross_entropy,
    )
"""

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedrounds.data import partition_indices
from fedrounds.data.loaders import Sampler
from fedrounds.doctor.batches import are_out_of_range, labels_among
from fedrounds.errors import InvalidInput
from fedrounds.goals import parse_goal
from fedrounds.nested import leaves_of
from fedrounds.plugins import naming_task_errors
from fedrounds.tensors.entries import DECLARABLE, entry_kinds, unfold_expanded, validate_entries
from fedrounds.training.metrics import MetricFactory
from fedrounds.training.objective import Loss, TrainingStep
from fedrounds.types import EntryKind

Examples = Dataset[Any] | DataLoader[Any]
"""What load_train and load_test return: a map-style or an iterable data set, or a DataLoader."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Share `index` (from 0) of a data set cut into `num_partitions`.

    All clients of a run must agree on everything but `index`; then their shares are disjoint.
    `parameters` are the scheme's own (see fedrounds.data.partitioners), such as alpha.
    """

    scheme: str = "iid"
    num_partitions: int = 10
    index: int
    seed: int
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_partitions:
            raise InvalidInput(
                f"partition {self.index} of {self.num_partitions} doesn't exist; partitions "
                f"count from 0 to {self.num_partitions - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Which examples are one client's own.

    With a `partition`: that share of a public data set, for experiments. Without (`local`):
    everything under `data_root` is this client's, and nothing is ever downloaded. The bundled
    `mnist-sample` has no data root, so none of it is a client's own.
    """

    data_root: Path | None = None
    partition: Partition | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its loss.

    `build_model` draws initial weights from torch's global generator, which the caller seeds.
    `load_train` gives one client's private examples, `load_test` the server's held-out set or
    None if there is none. Each is a map-style or an iterable data set, or a DataLoader.

    What is minimised is said in exactly one of two ways. With `loss` an example is (input, target),
    and `loss` takes (outputs, targets) of a batch to its mean, a scalar tensor; the outputs are all
    that the model returns. With `training_step` examples and batches may be anything, and
    `training_step` takes (model, batch) to the mean loss, to (loss, outputs), or to a dictionary or
    an object with `loss`; the doctor may call it again for the same batch, so it depends on its
    arguments and torch's generators alone.

    How batches are made, unless load_train returns a DataLoader: `collate` takes a list of examples
    to a batch (default: torch's), `sampler` takes (examples, generator) to the numbers of an
    epoch's examples, `num_workers` processes read them, and `batch_size` takes the place of the
    server's. All but `collate` are for training alone.

    The rest has defaults. `metrics` are measured over a whole data set besides accuracy and loss,
    on the server's held-out set and on what clients hold out: by name, each a function that makes a
    torchmetrics.Metric (see fedrounds.training.metrics), which is given the main output (see
    fedrounds.training.objective.main_output) and the targets. `num_classes` says that targets are
    whole numbers from 0 to below it, or -100, which torch's losses leave out; `finite_inputs` that
    a NaN or an infinity in an input is a mistake. Both are checked where the data is read (see
    `inspect_examples`). With `training_step` accuracy needs `num_classes`. `load_labels` gives
    what a partitioning of the examples under a data root goes by, int64 [n] from 0, in the order in
    which `load_train` gives them for one partition: `python -m fedclient partitions` counts it
    (without it the targets of each share), and a process that serves many clients cuts their shares
    by it, out of a data set read once. `entries` says how entries of the model's state_dict are
    aggregated that the usual table (see fedrounds.tensors.entries) would treat otherwise: a pattern
    of names to "keep", "max", "mean" or "local". `best_by` says which number of the held-out set
    tells the best model of a run, such as "f1:max".
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_train: Callable[[DataRequest], Examples]
    load_test: Callable[[Path | None], Examples | None]
    loss: Loss | None = None
    training_step: TrainingStep | None = None
    metrics: Mapping[str, MetricFactory] = field(default_factory=dict)
    num_classes: int | None = None
    finite_inputs: bool = True
    collate: Callable[[list[Any]], Any] | None = None
    sampler: Sampler | None = None
    num_workers: int = 0
    batch_size: int | None = None
    load_labels: Callable[[Path | None], NDArray[np.int64]] | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    best_by: str = "loss:min"

    def __post_init__(self) -> None:
        parse_goal(self.best_by)
        if (self.loss is None) == (self.training_step is None):
            given = "neither" if self.loss is None else "both"
            raise InvalidInput(
                f"task {self.name!r}: give it loss(outputs, targets), for examples of (input, "
                f"target), or training_step(model, batch); it has {given}"
            )
        if self.num_workers < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise InvalidInput(
                f"task {self.name!r}: num_workers must be 0 or more and batch_size 1 or more, but "
                f"they are {self.num_workers} and {self.batch_size}"
            )
        for pattern, kind in self.entries.items():
            if kind not in DECLARABLE:
                raise InvalidInput(
                    f"task {self.name!r}: entries {pattern!r} can't be declared {kind!r}; declare "
                    f"one of {', '.join(DECLARABLE)}"
                )
        for name in self.metrics:
            if not name.isidentifier() or name in _TAKEN_METRIC_NAMES:
                raise InvalidInput(
                    f"task {self.name!r}: a metric can't be called {name!r}; give it a name of "
                    f"letters, digits and _ that isn't one of {', '.join(_TAKEN_METRIC_NAMES)}"
                )


def build_model(task: Task) -> nn.Module:
    """Return the task's model with new initial weights, fit to be sent, aggregated and loaded.

    Raises:
        InvalidInput: it isn't a torch.nn.Module, or one of its tensors can't be sent.
        OwnCodeFailed: build_model raised an error, which is the cause.
    """
    with naming_task_errors(f"task {task.name!r}: build_model"):
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"task {task.name!r}: build_model returned a {type(model).__name__}, not a "
            "torch.nn.Module"
        )
    try:
        validate_entries(model)
    except InvalidInput as error:
        raise InvalidInput(f"task {task.name!r}: {error}") from error
    unfold_expanded(model)
    return model


def kinds_of(task: Task, model: nn.Module) -> dict[str, EntryKind]:
    """Return how each entry of the task's model is aggregated.

    Raises:
        InvalidInput: what the task declares of entries doesn't fit the model.
    """
    try:
        return entry_kinds(model, task.entries)
    except InvalidInput as error:
        raise InvalidInput(f"task {task.name!r}: {error}") from error


def count_examples(task: Task, examples: object, *, loaded_by: str) -> int:
    """Return how many examples there are in what the function `loaded_by` of the task returned.

    Raises:
        InvalidInput: it is no data set, or has no length.
    """
    counted = examples.dataset if isinstance(examples, DataLoader) else examples
    if not isinstance(counted, Sized) or not (
        isinstance(counted, IterableDataset) or has_numbers(counted)
    ):
        what = type(examples).__name__
        if counted is not examples:
            what += f" of a {type(counted).__name__} without a length"
        raise InvalidInput(
            f"task {task.name!r}: {loaded_by} returned a {what}; it must return a data set, such "
            "as a torch.utils.data.TensorDataset or an IterableDataset, or a DataLoader of a data "
            "set with a length"
        )
    return len(counted)


def has_numbers(examples: object) -> bool:
    """Return whether it is a map-style data set: each example has its number."""
    return hasattr(examples, "__getitem__") and not isinstance(
        examples, IterableDataset | DataLoader
    )


def validate_example(task: Task, example: object) -> None:
    """Refuse an example that can't be put into a batch of what the task's loss is for.

    Raises:
        InvalidInput: it isn't (input, target), though the task has a `loss`, or it holds something
            other than tensors, arrays, numbers and strings.
    """
    items = tuple(example) if isinstance(example, tuple | list) else ()
    kinds = ", ".join(type(item).__name__ for item in items)
    got = f"({kinds})" if items else f"a {type(example).__name__}"
    if task.loss is not None and len(items) != 2:
        raise InvalidInput(
            f"task {task.name!r}: an example is (input, target), but the first of the data set is "
            f"{got}; for other examples give the task training_step(model, batch) instead of loss"
        )
    for leaf in leaves_of(example):
        if not isinstance(leaf, Tensor | np.ndarray | Number | str | bytes):
            raise InvalidInput(
                f"task {task.name!r}: an example holds tensors, arrays, numbers and strings, but "
                f"the first of the data set, {got}, holds a {type(leaf).__name__}"
            )


def inspect_examples(task: Task, examples: Examples) -> list[int]:
    """Look for what the task says examples can't be; only tensors are looked at, others can't be.

    Returns:
        The examples, from 0, whose inputs hold a NaN or an infinity though the task says they
        don't: the first step that uses such an example goes wrong.

    Raises:
        InvalidInput: a target is no class of the task, or an example isn't (input, target) though
            the task has a `loss`.
    """
    if not isinstance(examples, TensorDataset):
        return []
    tensors = examples.tensors
    targets: Tensor | None
    if task.loss is None:
        targets = labels_among(tensors, len(examples), num_classes=task.num_classes)
        inputs = tensors
    elif len(tensors) == 2:
        inputs, targets = tensors[:1], tensors[1]
    else:
        raise InvalidInput(
            f"task {task.name!r}: an example is (input, target), but the data set has "
            f"{len(tensors)} tensors; give the task training_step(model, batch) instead of loss"
        )
    if task.num_classes is not None and targets is not None and len(targets) > 0:
        outside = _any_in_each(are_out_of_range(targets, task.num_classes))
        if outside.any():
            first = int(outside.nonzero()[0])
            raise InvalidInput(
                f"task {task.name!r}: example {first} (from 0) has the label "
                f"{targets[first].tolist()}; labels go from 0 to {task.num_classes - 1}"
            )
    # The sum is a screen a hundred times cheaper than looking at each number.
    suspects = [
        tensor
        for tensor in inputs
        if task.finite_inputs and tensor.is_floating_point() and not math.isfinite(tensor.sum())
    ]
    is_bad = torch.zeros(len(examples), dtype=torch.bool)
    for tensor in suspects:
        is_bad |= _any_in_each(~tensor.isfinite())
    bad: list[int] = is_bad.nonzero().flatten().tolist()
    return bad


def _any_in_each(is_so: Tensor) -> Tensor:
    """Return for each example [n] whether any of its entries [n, ...] is true."""
    return is_so.reshape(len(is_so), -1).any(dim=1)


def choose_indices(labels: NDArray[np.int64], partition: Partition) -> NDArray[np.int64]:
    """Return the sorted indices into `labels` [n] that are this partition's, int64.

    Raises:
        InvalidInput: the scheme is unknown or can't cut these labels so.
    """
    shares = partition_indices(
        labels,
        scheme=partition.scheme,
        num_partitions=partition.num_partitions,
        seed=partition.seed,
        parameters=partition.parameters,
    )
    return shares[partition.index]


_TAKEN_METRIC_NAMES = (
    *("accuracy", "loss", "class_accuracy", "confusion"),
    *("kind", "of", "client_id", "is_incident", "reason"),
)

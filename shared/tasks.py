"""What is learned: a Task is a model, its data and its loss, found by name.

Built in are `mnist-sample` (bundled, needs no network), `mnist`, `fashion-mnist`, `text` and
`tabular`. Your own lives in your own module, is found by `package.module:attribute`, and is the
same object on the server (which builds the model and holds the test set) and on every client:

    my_task = Task(
        name="my-task",
        build_model=lambda: nn.Linear(20, 2),
        load_train=lambda request: MyDataset(request.data_root),
        load_test=lambda data_root: None,
        loss=F.cross_entropy,
    )
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from shared.data import load_images, partition_indices, to_dataset
from shared.data.folders import unreadable
from shared.data.tables import Columns, load_tables
from shared.data.texts import NUM_CHARACTERS, WINDOW, load_windows
from shared.errors import DataUnavailable, InvalidInput
from shared.evaluation import Loss
from shared.models import CharGRU, SimpleCNN, TabularMLP
from shared.own_code import import_own
from shared.task_names import examine_task_name
from shared.types import EntryKind
from shared.weights import DECLARABLE, entry_kinds, examine_entries, unfold_expanded

Examples = Dataset[tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Share `index` (from 0) of a data set cut into `num_partitions`.

    All clients of a run must agree on everything but `index`; then their shares are disjoint.
    `parameters` are the scheme's own (see shared.data.partitioners), such as alpha.
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
    None if there is none; both are map-style data sets of (input, target). `loss` takes
    (outputs, targets) of a batch to its mean, a scalar tensor; the outputs are all that the model
    returns (see shared.evaluation.main_output).

    The rest has defaults. `metrics` are what the server measures on the held-out set besides
    accuracy and loss: by name, each like `loss`. `num_classes` says that targets are whole
    numbers from 0 to below it; `finite_inputs` that a NaN or an infinity in an input is a
    mistake. Both are checked where the data is read (see `examine_examples`). `load_labels` gives
    what a partitioning of the examples under a data root goes by, int64 [n] from 0, in the order in
    which `load_train` gives them for one partition: `python -m fedclient partitions` counts it
    (without it the targets of each share), and a process that serves many clients cuts their shares
    by it, out of a data set read once. `entries` says how entries of the model's state_dict are
    aggregated that the usual table (see shared.weights) would treat otherwise: a pattern of names
    to "keep", "max", "mean" or "local".
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_train: Callable[[DataRequest], Examples]
    load_test: Callable[[Path | None], Examples | None]
    loss: Loss
    metrics: Mapping[str, Loss] = field(default_factory=dict)
    num_classes: int | None = None
    finite_inputs: bool = True
    load_labels: Callable[[Path | None], NDArray[np.int64]] | None = None
    entries: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
    """
    model = task.build_model()
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"task {task.name!r}: build_model returned a {type(model).__name__}, not a "
            "torch.nn.Module"
        )
    try:
        examine_entries(model)
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


def find_task(name: str) -> Task:
    """Return the built-in task `name`, or the Task at `package.module:attribute`.

    `tabular` is told its columns behind its name (see `tabular_task`).

    Naming a module imports it, that is, runs its code: the name comes from this side's own
    settings, never from the other side of the wire.

    Raises:
        InvalidInput: no such task, module or attribute, the module's code goes wrong, or the
            attribute is not a Task.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name.partition(",")[0] == "tabular":
        return tabular_task(name)
    examine_task_name(name)
    module_name, _, attribute = name.partition(":")
    module = import_own(f"task {name!r}", module_name)
    if not hasattr(module, attribute):
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        raise InvalidInput(
            f"task {name!r}: {module_name} has no {attribute}; the tasks in it are: "
            f"{', '.join(tasks) or 'none'}"
        )
    found = getattr(module, attribute)
    if not isinstance(found, Task):
        raise InvalidInput(
            f"task {name!r} is a {type(found).__name__}, not a shared.tasks.Task; name the "
            f"attribute that holds the Task"
        )
    return found


def need_root(name: str, root: Path | None) -> Path:
    """Return the data root of the task of this name, for which nothing can stand in.

    Raises:
        InvalidInput: none was given.
        DataUnavailable: it is no folder.
    """
    if root is None:
        raise InvalidInput(f"task {name!r} needs --data-root, the folder of this side's own files")
    try:
        is_folder, exists = root.is_dir(), root.exists()
    except OSError as error:
        raise unreadable(error, root) from error
    if not is_folder:
        what = "is no folder" if exists else "doesn't exist"
        raise DataUnavailable(
            f"task {name!r}: --data-root {root} {what}; name the folder of this side's own files"
        )
    return root


def examine_examples(task: Task, examples: Examples) -> list[int]:
    """Look for what the task says examples can't be; only tensors are looked at, others can't be.

    Returns:
        The examples, from 0, whose inputs hold a NaN or an infinity though the task says they
        don't: training stops at the first of them, and says in which step.

    Raises:
        InvalidInput: a target is no class of the task, or an example isn't (input, target).
    """
    if not isinstance(examples, TensorDataset):
        return []
    if len(examples.tensors) != 2:
        raise InvalidInput(
            f"task {task.name!r}: an example is (input, target), but the data set has "
            f"{len(examples.tensors)} tensors"
        )
    inputs, targets = examples.tensors
    if task.num_classes is not None and len(targets) > 0:
        outside = _any_in_each((targets < 0) | (targets >= task.num_classes))
        if outside.any():
            first = int(outside.nonzero()[0])
            raise InvalidInput(
                f"task {task.name!r}: example {first} (from 0) has the label "
                f"{targets[first].tolist()}; labels go from 0 to {task.num_classes - 1}"
            )
    # The sum is a screen a hundred times cheaper than looking at each number.
    if not (task.finite_inputs and inputs.is_floating_point()) or math.isfinite(inputs.sum()):
        return []
    bad: list[int] = _any_in_each(~inputs.isfinite()).nonzero().flatten().tolist()
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


def _load_train(name: str, request: DataRequest) -> Examples:
    # Without a partition the examples are the client's own: nothing public stands in for them.
    if request.partition is None and request.data_root is None:
        if name == "mnist-sample":
            raise InvalidInput(
                f"task {name!r} has no data of a client's own; leave --source local out"
            )
        raise InvalidInput(
            f"task {name!r} with local data needs --data-root, the folder of this client's own "
            f"files; for a share of the public data set choose a partition"
        )
    data = load_images(
        name,
        "train",
        data_root=request.data_root,
        may_download=request.partition is not None,
    )
    if request.partition is None:
        return to_dataset(data)
    return to_dataset(data, choose_indices(data.labels, request.partition))


def _load_test(name: str, data_root: Path | None) -> Examples:
    return to_dataset(load_images(name, "test", data_root=data_root, may_download=True))


def _image_task(name: str) -> Task:
    return Task(
        name=name,
        build_model=SimpleCNN,
        load_train=functools.partial(_load_train, name),
        load_test=functools.partial(_load_test, name),
        loss=F.cross_entropy,
        num_classes=10,
        load_labels=lambda root: (
            load_images(name, "train", data_root=root, may_download=True).labels
        ),
    )


def tabular_task(name: str) -> Task:
    """Return the task of classifying the rows of CSV files, as `name` says.

    Server and clients share nothing but the task's name, so all they must agree on is in it:

        tabular,label=species,features=petal_length+petal_width,classes=setosa+virginica

    `classes` may also be a number n: then the labels are 0 to n - 1. No name may hold a comma or
    a plus.

    Raises:
        InvalidInput: a part is missing, unknown, or empty.
    """
    parts = dict.fromkeys(("label", "features", "classes"), "")
    for word in name.split(",")[1:]:
        key, _, value = word.partition("=")
        if key not in parts or not value or parts[key]:
            raise InvalidInput(
                f"task {name!r}: {word!r} is unknown, empty or there twice; {_TABULAR_USAGE}"
            )
        parts[key] = value
    if missing := [key for key, value in parts.items() if not value]:
        raise InvalidInput(f"task {name!r} lacks {', '.join(missing)}; {_TABULAR_USAGE}")
    features, classes = (tuple(parts[key].split("+")) for key in ("features", "classes"))
    if len(classes) == 1 and classes[0].isdecimal():
        if len(classes[0]) > _MAX_CLASSES_DIGITS:
            raise InvalidInput(
                f"task 'tabular': classes is a number of {len(classes[0])} digits; give at most "
                f"{_MAX_CLASSES_DIGITS}"
            )
        classes = tuple(str(number) for number in range(int(classes[0])))
    label = parts["label"]
    if len(set(classes)) < max(2, len(classes)) or len({label, *features}) <= len(features):
        raise InvalidInput(
            f"task {name!r}: there must be two classes or more, and no name twice; {_TABULAR_USAGE}"
        )
    columns = Columns(label=label, features=features, classes=classes)

    def load(root: Path | None, partition: Partition | None) -> TensorDataset:
        rows, labels = load_tables(need_root("tabular", root), columns)
        return _share((rows, labels), labels, partition)

    return Task(
        name=name,
        build_model=functools.partial(TabularMLP, len(features), len(classes)),
        load_train=lambda request: load(request.data_root, request.partition),
        load_test=lambda data_root: None if data_root is None else load(data_root, None),
        loss=F.cross_entropy,
        num_classes=len(classes),
        load_labels=lambda root: load_tables(need_root("tabular", root), columns)[1],
    )


def _text_task() -> Task:
    def load(root: Path | None, partition: Partition | None) -> TensorDataset:
        windows, file_numbers = load_windows(need_root("text", root))
        # Files play the part of labels: a partition by classes deals out whole authors.
        return _share((windows[:, :WINDOW], windows[:, 1:]), file_numbers, partition)

    return Task(
        name="text",
        build_model=functools.partial(CharGRU, NUM_CHARACTERS),
        load_train=lambda request: load(request.data_root, request.partition),
        load_test=lambda data_root: None if data_root is None else load(data_root, None),
        loss=F.cross_entropy,
        metrics={"top5_accuracy": _top5_accuracy},
        num_classes=NUM_CHARACTERS,
        load_labels=lambda root: load_windows(need_root("text", root))[1],
    )


def _top5_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    likeliest = outputs.topk(5, dim=1).indices
    return (likeliest == targets.unsqueeze(1)).any(dim=1).float().mean()


def _share(
    arrays: tuple[NDArray[Any], ...], labels: NDArray[np.int64], partition: Partition | None
) -> TensorDataset:
    """Return the partition's share of `arrays`, whose first dimension is that of `labels`."""
    chosen = slice(None) if partition is None else choose_indices(labels, partition)
    return TensorDataset(*(torch.from_numpy(array[chosen].copy()) for array in arrays))


_TAKEN_METRIC_NAMES = ("accuracy", "loss", "kind", "of", "client_id", "is_incident")
_MAX_CLASSES_DIGITS = 4
_TABULAR_USAGE = "write it as tabular,label=NAME,features=NAME+NAME,classes=NAME+NAME"
_BUILT_IN = {name: _image_task(name) for name in ("mnist-sample", "mnist", "fashion-mnist")}
_BUILT_IN["text"] = _text_task()

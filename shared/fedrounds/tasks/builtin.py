"""The built-in tasks, and the search for a task by its name."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from fedrounds.data import load_images, to_dataset
from fedrounds.data.folders import unreadable
from fedrounds.data.tables import Columns, load_tables
from fedrounds.data.texts import NUM_CHARACTERS, WINDOW, load_windows
from fedrounds.errors import DataUnavailable, InvalidInput
from fedrounds.plugins import import_own
from fedrounds.tasks.models import CharGRU, SimpleCNN, TabularMLP
from fedrounds.tasks.names import validate_task_name
from fedrounds.tasks.task import DataRequest, Examples, Partition, Task, choose_indices


def find_task(name: str) -> Task:
    """Return the built-in task `name`, or the Task at `package.module:attribute`.

    The name of `tabular` also holds its columns (see `tabular_task`).

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
    validate_task_name(name)
    module_name, _, attribute = name.partition(":")
    module = import_own(f"task {name!r}", module_name)
    if not hasattr(module, attribute):
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        raise InvalidInput(
            f"task {name!r}: {module_name} has no {attribute}; the tasks in it are: "
            f"{', '.join(tasks) or 'none'}"
        )
    task = getattr(module, attribute)
    if not isinstance(task, Task):
        raise InvalidInput(
            f"task {name!r} is a {type(task).__name__}, not a fedrounds.Task; name the "
            f"attribute that holds the Task"
        )
    return task


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
                f"task {name!r}: {word!r} is unknown, empty or given twice; {_TABULAR_USAGE}"
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
        metrics={"top5_accuracy": _Top5Accuracy},
        num_classes=NUM_CHARACTERS,
        load_labels=lambda root: load_windows(need_root("text", root))[1],
    )


class _Top5Accuracy:
    """The share of targets that are among the five likeliest answers."""

    # Not torchmetrics' own: the import takes seconds and 120 MB, on every machine of a run.

    def __init__(self) -> None:
        self._num_right = self._num_targets = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        likeliest = outputs.topk(5, dim=1).indices
        self._num_right += int((likeliest == targets.unsqueeze(1)).any(dim=1).sum())
        self._num_targets += targets.numel()

    def compute(self) -> float:
        return self._num_right / self._num_targets


def _share(
    arrays: tuple[NDArray[Any], ...], labels: NDArray[np.int64], partition: Partition | None
) -> TensorDataset:
    """Return the partition's share of `arrays`, whose first dimension is that of `labels`."""
    chosen = slice(None) if partition is None else choose_indices(labels, partition)
    return TensorDataset(*(torch.from_numpy(array[chosen].copy()) for array in arrays))


_MAX_CLASSES_DIGITS = 4
_TABULAR_USAGE = "write it as tabular,label=NAME,features=NAME+NAME,classes=NAME+NAME"
_BUILT_IN = {name: _image_task(name) for name in ("mnist-sample", "mnist", "fashion-mnist")}
_BUILT_IN["text"] = _text_task()

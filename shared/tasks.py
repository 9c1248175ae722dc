"""What is learned: a Task is a model, its data and its loss, found by name.

Built in are `mnist-sample` (bundled, needs no network), `mnist` and `fashion-mnist`. Your own
lives in your own module, is found by `package.module:attribute`, and is the same object on the
server (which builds the model and holds the test set) and on every client:

    my_task = Task(
        name="my-task",
        build_model=lambda: nn.Linear(20, 2),
        load_train=lambda request: MyDataset(request.data_root),
        load_test=lambda data_root: None,
        loss=F.cross_entropy,
    )
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared.data import load_images, partition_indices, to_dataset
from shared.errors import InvalidInput
from shared.models import SimpleCNN

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
    `mnist-sample` has no data root; there `local` is all of it.
    """

    data_root: Path | None = None
    partition: Partition | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its loss.

    `build_model` draws initial weights from torch's global generator, which the caller seeds.
    `load_train` gives one client's private examples, `load_test` the server's held-out set or
    None if there is none; both are map-style data sets of (input, target). `loss` takes
    (outputs, targets) of a batch to its mean, a scalar tensor.
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_train: Callable[[DataRequest], Examples]
    load_test: Callable[[Path | None], Examples | None]
    loss: Callable[[Tensor, Tensor], Tensor]


def find_task(name: str) -> Task:
    """Return the built-in task `name`, or the Task at `package.module:attribute`.

    Naming a module imports it, that is, runs its code: the name comes from this side's own
    settings, never from the other side of the wire.

    Raises:
        InvalidInput: no such task, module or attribute, or the attribute is not a Task.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InvalidInput(
            f"there is no task {name!r}; there are: {', '.join(_BUILT_IN)}; a task of your own "
            f"is named package.module:attribute"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidInput(
            f"task {name!r}: importing {module_name} failed ({error}); is it installed or on "
            f"PYTHONPATH?"
        ) from error
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
    if request.partition is None and request.data_root is None and name != "mnist-sample":
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
    )


_BUILT_IN = {name: _image_task(name) for name in ("mnist-sample", "mnist", "fashion-mnist")}

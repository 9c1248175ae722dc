"""A task's examples and their batches, whatever its load_train or load_test returns.

A map-style data set is the usual case: its examples have numbers, so that shares of it can be held
out and the doctor can name an example. An iterable data set and a DataLoader give their own order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from fedrounds.data import make_loader
from fedrounds.data.loaders import WORKER_CONTEXT, worker_options
from fedrounds.errors import InvalidInput
from fedrounds.tasks.task import DataRequest, Examples, Task


class CountedStream(IterableDataset[Any]):
    """The examples of an iterable data set whose number is known."""

    def __init__(self, examples: IterableDataset[Any], num_examples: int) -> None:
        self.examples = examples
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


def load_examples(task: Task, request: DataRequest) -> Examples:
    """Return what the task's load_train returns; an iterable data set always has a length then.

    A data set without a length is read once to count its examples.

    Raises:
        InvalidInput: the task wants worker processes, which can't import its data set or collate.
    """
    examples = _with_length(task.load_train(request))
    if task.num_workers > 0 and not isinstance(examples, DataLoader):
        for what, value in (("collate", task.collate), ("data set", _innermost(examples))):
            if value is not None:
                _require_importable(task, what, value)
    return examples


def load_held_out(task: Task, data_root: Path | None) -> Examples | None:
    """Return what the task's load_test returns, as in `load_examples`."""
    examples = task.load_test(data_root)
    return None if examples is None else _with_length(examples)


def training_batches(
    task: Task,
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> DataLoader[Any]:
    """Return batches to train on, in an order that depends on the seed alone.

    `batch_size` holds unless the task or its DataLoader has its own. `numbers` are the examples to
    use, None: all.
    """
    if isinstance(examples, DataLoader):
        return _seeded(examples, seed)
    size = task.batch_size or batch_size
    if isinstance(examples, IterableDataset):
        return DataLoader(
            examples,
            batch_size=size,
            collate_fn=task.collate,
            generator=torch.Generator().manual_seed(seed),
            **worker_options(task.num_workers),
        )
    return make_loader(
        examples,
        batch_size=size,
        seed=seed,
        numbers=numbers,
        collate=task.collate,
        sampler=task.sampler,
        num_workers=task.num_workers,
    )


def batches_in_order(
    task: Task, examples: Examples, *, batch_size: int, numbers: Sequence[int] | None = None
) -> DataLoader[Any]:
    """Return batches to evaluate on, made in this process; a DataLoader gives its own."""
    if isinstance(examples, DataLoader):
        return _seeded(examples, 0)
    if isinstance(examples, IterableDataset):
        return DataLoader(
            examples,
            batch_size=batch_size,
            collate_fn=task.collate,
            generator=torch.Generator().manual_seed(0),
        )
    return make_loader(
        examples, batch_size=batch_size, shuffle=False, numbers=numbers, collate=task.collate
    )


def _with_length(examples: Examples) -> Examples:
    if isinstance(examples, IterableDataset) and not hasattr(examples, "__len__"):
        return CountedStream(examples, sum([1 for _ in examples]))
    return examples


def _seeded(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """Return the loader with its random streams begun at a seed, and safe workers if any."""
    generator = torch.Generator().manual_seed(seed)
    loader.generator = generator
    samplers: tuple[Any, ...] = (
        loader.sampler,
        loader.batch_sampler,
        getattr(loader.batch_sampler, "sampler", None),
    )
    for sampler in samplers:
        if hasattr(sampler, "generator"):
            sampler.generator = generator
    if loader.num_workers > 0:
        # A process that was forked beside gRPC's threads may hang.
        loader.multiprocessing_context = WORKER_CONTEXT
    return loader


def _innermost(examples: Examples) -> object:
    while isinstance(examples, Subset | CountedStream):
        inner = examples.dataset if isinstance(examples, Subset) else examples.examples
        assert isinstance(inner, Dataset)
        examples = inner
    return type(examples)


def _require_importable(task: Task, what: str, value: Any) -> None:  # noqa: ANN401
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", type(value).__module__)
    if module == "__main__" or "<" in name:
        raise InvalidInput(
            f"task {task.name!r}: num_workers is {task.num_workers}, but a worker process can't "
            f"import its {what}, {name} of {module}; define it at the top level of a module, or "
            "leave num_workers at 0"
        )

"""Batches of a data set."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from fedrounds.errors import InvalidInput

WORKER_CONTEXT = "forkserver"
"""How worker processes start: forked from a process without threads. This process has gRPC's, and a
process that is forked beside them may hang."""

Sampler = Callable[[Dataset[Any], torch.Generator], Iterable[int]]
"""Takes (the examples, a generator) to the numbers of an epoch's examples, anew for each pass over
the result, such as a torch.utils.data.WeightedRandomSampler with that generator."""


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return a DataLoader's arguments for so many worker processes, which stay over all epochs."""
    if num_workers == 0:
        return {}
    # Or each worker of each order imports torch: seconds.
    multiprocessing.set_forkserver_preload(["torch"])
    return {
        "num_workers": num_workers,
        "multiprocessing_context": WORKER_CONTEXT,
        "persistent_workers": True,
    }


class NumberedSampler(BatchSampler):
    """Batches of example numbers; `waiting` are those yielded, without what was taken out."""

    waiting: deque[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one pass."""
        self.waiting = waiting = deque[list[int]]()
        for numbers in super().__iter__():
            waiting.append(numbers)
            yield numbers


class NumberedLoader(DataLoader[Any]):
    """A DataLoader that knows the numbers of the newest batch's examples."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: NumberedSampler,
        *,
        generator: torch.Generator,
        collate: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        options = worker_options(num_workers)
        # Without its own generator a DataLoader draws from the global generator in every epoch.
        if isinstance(dataset, TensorDataset) and collate is None:
            # One indexing operation gathers a whole batch.
            super().__init__(
                dataset, sampler=batches, batch_size=None, generator=generator, **options
            )
        else:
            super().__init__(
                dataset, batch_sampler=batches, generator=generator, collate_fn=collate, **options
            )
        # A private attribute: DataLoader forbids setting some of its public attributes later.
        self._numbered = batches
        self._newest: list[int] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator is all it needs
        """Yield the batches of one pass; workers read ahead, but give batches in order."""
        for batch in super().__iter__():
            self._newest = self._numbered.waiting.popleft()
            yield batch

    @property
    def newest_indices(self) -> list[int]:
        """The numbers in the data set, from 0, of the newest batch's examples."""
        return self._newest


class _MappedNumbers:
    """What a sampler draws among `numbers`, as numbers in the whole data set."""

    def __init__(self, drawn: Iterable[int], numbers: Sequence[int]) -> None:
        self._drawn = drawn
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return (self._numbers[position] for position in self._drawn)

    def __len__(self) -> int:
        return len(self._drawn)  # type: ignore[arg-type]  # samplers have a length


def make_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
    numbers: Sequence[int] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    sampler: Sampler | None = None,
    num_workers: int = 0,
) -> NumberedLoader:
    """Return a loader of batches of a map-style data set; the last batch may be smaller.

    `numbers` are the examples to use, from 0; None: all. With `shuffle` the order comes from
    `generator`, or from a new generator seeded with `seed`, and differs in each epoch. The global
    generator isn't used. A `sampler` chooses the order in place of shuffling. `collate` takes a
    list of examples to a batch; the default is torch's. With `num_workers` so many other processes
    read the examples, each with random streams that the generator begins.

    Raises:
        InvalidInput: batch_size below 1, no examples, or shuffling without exactly one of seed
            and generator.
    """
    taken: Sequence[int] = (
        range(len(dataset))  # type: ignore[arg-type]  # Dataset doesn't declare __len__
        if numbers is None
        else numbers
    )
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, but is {batch_size}")
    if len(taken) == 0:
        raise InvalidInput("the data set has no examples")
    if shuffle and (seed is None) == (generator is None):
        raise InvalidInput("shuffling needs a seed or a generator, and not both")
    if generator is None:
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
    order: Iterable[int] = taken
    if shuffle and sampler is not None:
        chosen = dataset if numbers is None else Subset(dataset, numbers)
        order = _MappedNumbers(sampler(chosen, generator), taken)
    elif shuffle and numbers is None:
        order = RandomSampler(taken, generator=generator)
    elif shuffle:
        order = SubsetRandomSampler(taken, generator=generator)
    batches = NumberedSampler(order, batch_size, drop_last=False)
    return NumberedLoader(
        dataset, batches, generator=generator, collate=collate, num_workers=num_workers
    )


def set_aside(num_examples: int, *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers, from 0, of training examples and of held-out examples, both ascending.

    The share is rounded to a number of examples. At least 1 example is held out and at least 1 is
    left, but none is held out if `share` is 0 or there is only 1 example. With the same seed, a
    smaller share is part of a larger share.
    """
    num_held_out = min(max(1, round(share * num_examples)), num_examples - 1) if share else 0
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])

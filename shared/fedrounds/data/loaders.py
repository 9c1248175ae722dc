"""Batches of a data set."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from fedrounds.errors import InvalidInput


class NumberedSampler(BatchSampler):
    """Batches of example numbers; `newest` is the last batch that was yielded."""

    newest: list[int]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one pass."""
        for numbers in super().__iter__():
            self.newest = numbers
            yield numbers


class NumberedLoader(DataLoader[tuple[Tensor, ...]]):
    """A DataLoader in one process that knows the numbers of the newest batch's examples."""

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, ...]],
        batches: NumberedSampler,
        *,
        generator: torch.Generator,
    ) -> None:
        # Without its own generator a DataLoader draws from the global generator in every epoch.
        if isinstance(dataset, TensorDataset):
            # One indexing operation gathers a whole batch.
            super().__init__(dataset, sampler=batches, batch_size=None, generator=generator)
        else:
            super().__init__(dataset, batch_sampler=batches, generator=generator)
        # A private attribute: DataLoader forbids setting some of its public attributes later.
        self._numbered = batches

    @property
    def newest_indices(self) -> list[int]:
        """The numbers in the data set, from 0, of the newest batch's examples."""
        return self._numbered.newest


def make_loader(
    dataset: Dataset[tuple[Tensor, ...]],
    *,
    batch_size: int,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
    numbers: Sequence[int] | None = None,
) -> NumberedLoader:
    """Return a loader of batches of a map-style data set; the last batch may be smaller.

    `numbers` are the examples to use, from 0; None: all. With `shuffle` the order comes from
    `generator`, or from a new generator seeded with `seed`, and differs in each epoch. The global
    generator isn't used. Everything happens in this process, since a forked worker may crash once
    gRPC runs.

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
    if shuffle and numbers is None:
        order = RandomSampler(taken, generator=generator)
    elif shuffle:
        order = SubsetRandomSampler(taken, generator=generator)
    batches = NumberedSampler(order, batch_size, drop_last=False)
    return NumberedLoader(dataset, batches, generator=generator)


def set_aside(num_examples: int, *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers, from 0, of training examples and of held-out examples, both ascending.

    The share is rounded to a number of examples. At least 1 example is held out and at least 1 is
    left, but none is held out if `share` is 0 or there is only 1 example. With the same seed, a
    smaller share is part of a larger share.
    """
    num_held_out = min(max(1, round(share * num_examples)), num_examples - 1) if share else 0
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])

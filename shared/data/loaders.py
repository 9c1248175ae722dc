"""From a data set to batches."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from shared.errors import InvalidInput


class NumberedSampler(BatchSampler):
    """Batches of examples' numbers; `newest` is the one given last."""

    newest: list[int]

    def __iter__(self) -> Iterator[list[int]]:
        """Give the batches of one pass."""
        for numbers in super().__iter__():
            self.newest = numbers
            yield numbers


class NumberedLoader(DataLoader[tuple[Tensor, ...]]):
    """A DataLoader in one process that tells which examples the newest batch is made of."""

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, ...]],
        batches: NumberedSampler,
        *,
        generator: torch.Generator,
    ) -> None:
        # Without a generator of its own a DataLoader draws from the global one in every epoch.
        if isinstance(dataset, TensorDataset):
            # One indexing operation gathers a batch, instead of one for each example.
            super().__init__(dataset, sampler=batches, batch_size=None, generator=generator)
        else:
            super().__init__(dataset, batch_sampler=batches, generator=generator)
        # Among a DataLoader's attributes it would be one more that can't be set later.
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
) -> NumberedLoader:
    """Return batches of a map-style data set, the last one smaller if it must be.

    With `shuffle` the order comes from `generator`, or from a new one seeded with `seed`, and
    is another one in each epoch. The global generator isn't touched. Everything happens in this
    process: a forked worker may crash once gRPC runs.

    Raises:
        InvalidInput: batch_size below 1, no examples, or shuffling without exactly one of seed
            and generator.
    """
    num_examples = len(dataset)  # type: ignore[arg-type]  # Dataset doesn't declare __len__
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, but is {batch_size}")
    if num_examples == 0:
        raise InvalidInput("the data set has no examples")
    if shuffle and (seed is None) == (generator is None):
        raise InvalidInput("shuffling needs a seed or a generator, and not both")
    if generator is None:
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
    order: Sampler[int] = (
        RandomSampler(range(num_examples), generator=generator)
        if shuffle
        else SequentialSampler(range(num_examples))
    )
    batches = NumberedSampler(order, batch_size, drop_last=False)
    return NumberedLoader(dataset, batches, generator=generator)

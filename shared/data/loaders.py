"""From a data set to batches."""

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


def make_loader(
    dataset: Dataset[tuple[Tensor, ...]],
    *,
    batch_size: int,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
) -> DataLoader[tuple[Tensor, ...]]:
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
    batches = BatchSampler(order, batch_size, drop_last=False)
    # Without a generator of its own a DataLoader draws from the global one in every epoch.
    if isinstance(dataset, TensorDataset):
        # One indexing operation gathers a batch, instead of one for each example.
        return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)
    return DataLoader(dataset, batch_sampler=batches, generator=generator)

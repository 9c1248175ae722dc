"""Means over a cohort."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from fedserver.strategies.blocks import (
    BLOCK_ELEMENTS,
    Block,
    BlockFunction,
    BlockReader,
    StateFile,
    compute_blocks,
)
from shared.weights import EntryKind


def weighted_mean(
    base: StateFile, updates: Sequence[StateFile], kinds: Mapping[str, EntryKind]
) -> Iterator[tuple[Block, torch.Tensor]]:
    """Average the clients' state_dicts, weighted by num_examples (McMahan et al. 2017, alg. 1).

    Exact in order: num_examples * value is summed in float64 in the order of `updates` and divided
    once. Weights are integers below 2^29, so products with float32 and narrower are exact (29 + 24
    bits fit in 53) and fused and unfused arithmetic agree; float64 entries are multiplied and added
    in two roundings for the same reason. Thus the bytes depend on nothing but the arguments.

    Parameters and float buffers are averaged, counters take the maximum, anything else stays as in
    the base. Without updates, or with a total weight of zero, the next model is the base.
    """
    total = sum(update.num_examples for update in updates)

    def begin() -> BlockFunction:
        reader = BlockReader()
        accumulator = torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)

        def compute(block: Block) -> torch.Tensor:
            kind = kinds[block.name]
            if total == 0 or kind is EntryKind.FIXED:
                return reader.read(base, block).clone()
            if kind is EntryKind.COUNTER:
                largest = reader.read(base, block).clone()
                for update in updates:
                    torch.maximum(largest, reader.read(update, block), out=largest)
                return largest
            # Minus zero is the sum's neutral element; from plus zero on, a mean of -0.0 were +0.0.
            mean = accumulator[: block.count].fill_(-0.0)
            for update in updates:
                values = reader.read(update, block)
                if values.dtype is torch.float64:
                    mean.add_(values.mul_(update.num_examples))
                else:
                    mean.add_(values, alpha=update.num_examples)
            mean.div_(total)
            return mean.to(base.layout.entries[block.name].dtype, copy=True)

        return compute

    return compute_blocks(base.layout, begin)

"""Asynchronous aggregation: a buffer of updates that began with models of different ages.

Each update's delta is relative to the model that its own order began with. Updates that began with
an older model count less.
"""

import math
from collections.abc import Callable

import torch

from fedrounds.errors import InvalidInput
from fedrounds.strategies.blocks import (
    BLOCK_ELEMENTS,
    Block,
    BlockFunction,
    BlockReader,
    Cohort,
    StateFile,
)
from fedrounds.strategies.components import WeightedAggregator
from fedrounds.strategies.means import Weights, weighted_sum
from fedrounds.types import EntryKind

MAX_BUFFER_SIZE = 100_000


def fedbuff(
    *, buffer_size: int = 10, staleness_exponent: float = 0.5, by_examples: bool = False
) -> WeightedAggregator:
    """Asynchronous: a round ends with each buffer_size updates (Nguyen et al. 2022).

    "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1. With d_i the delta of
    update i from the model that its order began with, and s_i the number of rounds since that
    model, the model moves by the mean over the buffer of d_i / (1 + s_i)^staleness_exponent: the
    paper's sum divided by K, so stale updates make the move shorter. For the paper's server rate
    and momentum, use fedbuff+fedavgm.

    Float buffers such as BatchNorm's aren't sums of steps: they become the mean of the updates'
    buffers, weighted by num_examples. The weight that a stale update loses goes to the global
    model's buffer, so a variance stays a variance.

    Args:
        buffer_size: the paper's K, the number of updates in a round.
        staleness_exponent: 0.5 is the paper's 1 / sqrt(1 + s); 0: stale updates count in full.
        by_examples: 1: d_i counts by num_examples; 0: all clients the same, as in the paper.
    """
    if not 1 <= buffer_size <= MAX_BUFFER_SIZE:
        raise InvalidInput(f"buffer_size is {buffer_size}; it must be 1 to {MAX_BUFFER_SIZE}")
    if not 0 <= staleness_exponent < math.inf:
        raise InvalidInput(f"staleness_exponent is {staleness_exponent:g}; it must be 0 or above")

    def prepare(cohort: Cohort) -> Callable[[], BlockFunction]:
        factors = [_factor(update.staleness, staleness_exponent) for update in cohort.updates]
        examples = [update.num_examples for update in cohort.updates]
        of_buffers = _weights(examples, factors)
        of_deltas = of_buffers if by_examples else _weights([1] * len(examples), factors)

        def begin() -> BlockFunction:
            accumulator = torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)
            parameters = _moved(cohort, of_deltas, accumulator=accumulator)
            buffers = weighted_sum(
                cohort, of_buffers, reader=BlockReader(), accumulator=accumulator
            )

            def compute(block: Block) -> torch.Tensor:
                is_parameter = cohort.kinds[block.name] is EntryKind.PARAMETER
                return parameters(block) if is_parameter else buffers(block)

            return compute

        return begin

    return WeightedAggregator(aggregator=prepare, buffer_size=buffer_size)


def _factor(staleness: int, exponent: float) -> float | int:
    # An integer keeps the mean of fresh updates exact (see weighted_sum).
    return (1 + staleness) ** -exponent if staleness and exponent else 1


def _weights(counts: list[int], factors: list[float | int]) -> Weights:
    weights = [count * factor for count, factor in zip(counts, factors, strict=True)]
    total = sum(counts)
    is_fresh = all(isinstance(weight, int) for weight in weights)
    return Weights(weights, total, of_base=0 if is_fresh else total - math.fsum(weights))


def _moved(cohort: Cohort, weights: Weights, *, accumulator: torch.Tensor) -> BlockFunction:
    """Return a function that computes base + sum of weight * (update - its own base) / total.

    It computes in float64, in the order of `updates`, and rounds after each multiplication and each
    addition, so the bytes depend on the arguments alone.
    """
    # Two readers, since a reader's next read overwrites its last result.
    reader, own_reader = BlockReader(), BlockReader()
    terms = [
        (update, _own_base(cohort, update), weight)
        for update, weight in zip(cohort.updates, weights.of_updates, strict=True)
    ]

    def compute(block: Block) -> torch.Tensor:
        moved = accumulator[: block.count].zero_()
        for update, own_base, weight in terms:
            delta = reader.read(update, block).to(torch.float64, copy=True)
            moved.add_(delta.sub_(own_reader.read(own_base, block)).mul_(weight))
        return moved.div_(weights.total).add_(reader.read(cohort.base, block))

    return compute


def _own_base(cohort: Cohort, update: StateFile) -> StateFile:
    return update.base or cohort.base

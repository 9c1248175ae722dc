"""Asynchronous training: a buffer of updates that began with models of different ages.

The model moves by what each client has changed of the model that its own order began with. Whoever
trained on an older model counts less.
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
    """Asynchronous: a step whenever buffer_size updates are there (Nguyen et al. 2022).

    "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1. With d_i the delta of
    update i from the model that its order began with, and s_i the steps made since that model, the
    model moves by the mean over the buffer of d_i / (1 + s_i)^staleness_exponent: the paper's sum
    divided by K, so that stale updates make the step shorter. Its server rate and momentum are
    those of fedavgm: fedbuff+fedavgm.

    Float buffers such as BatchNorm's are no sums of steps: they become the mean of the updates'
    own, by num_examples, of which each stale one leaves the share that it lacks of its weight to
    the model's. So a variance stays one.

    Args:
        buffer_size: the paper's K, the updates of one step.
        staleness_exponent: 0.5 is the paper's 1 / sqrt(1 + s); 0: stale updates count in full.
        by_examples: 1: d_i counts by num_examples; 0: all clients the same, as in the paper.
    """
    if not 1 <= buffer_size <= MAX_BUFFER_SIZE:
        raise InvalidInput(f"buffer_size is {buffer_size}; it must be 1 to {MAX_BUFFER_SIZE}")
    if not 0 <= staleness_exponent < math.inf:
        raise InvalidInput(f"staleness_exponent is {staleness_exponent:g}; it must be 0 or above")

    def prepare(cohort: Cohort) -> Callable[[], BlockFunction]:
        factors = [_factor(one.staleness, staleness_exponent) for one in cohort.updates]
        examples = [one.num_examples for one in cohort.updates]
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
    is_fresh = all(isinstance(one, int) for one in weights)
    return Weights(weights, total, of_base=0 if is_fresh else total - math.fsum(weights))


def _moved(cohort: Cohort, weights: Weights, *, accumulator: torch.Tensor) -> BlockFunction:
    """Return what computes base + sum of weight * (update - its own base) / total.

    In float64, in the order of `updates`, multiplied and added in two roundings: the bytes depend
    on nothing but the arguments.
    """
    # One each: what a reader has returned, its next read overwrites.
    reader, own_reader = BlockReader(), BlockReader()
    terms = [
        (one, _own_base(cohort, one), weight)
        for one, weight in zip(cohort.updates, weights.of_updates, strict=True)
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

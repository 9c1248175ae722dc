"""Weighted aggregators: the weight of an update may depend on what its client reports.

A client that lies gets as much weight as the server's limits admit. Aggregators that don't trust
the cohort are in fedrounds.strategies.robust.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedrounds.errors import InvalidInput
from fedrounds.strategies.blocks import (
    BLOCK_ELEMENTS,
    Aggregator,
    Block,
    BlockFunction,
    BlockReader,
    Cohort,
)
from fedrounds.strategies.components import (
    Requirement,
    StrategySettings,
    UnfitCohort,
    WeightedAggregator,
    no_requirement,
)
from fedrounds.strategies.geometry import squared_norms
from fedrounds.training.effective_steps import effective_steps
from fedrounds.types import EntryKind

# Smaller losses count as this in the derivative of F^q, which is infinite at 0 if q is below 1.
_LEAST_LOSS = 1e-10
# Beyond the power of any honest loss, and small enough for sums of products in float64.
_MAX_POWER = 1e150


@dataclass(frozen=True)
class Weights:
    """The next parameters are (of_base * base + sum of_updates[i] * updates[i]) / total."""

    of_updates: Sequence[float]
    total: float
    of_base: float = 0.0


def fedavg() -> WeightedAggregator:
    """Mean weighted by num_examples (McMahan et al. 2017, algorithm 1).

    "Communication-Efficient Learning of Deep Networks from Decentralized Data".
    """
    return WeightedAggregator(aggregator=mean_by(_by_num_examples))


def qfedavg(
    *, q: float = 1.0, lipschitz: float = 0.0, settings: StrategySettings
) -> WeightedAggregator:
    """Clients with a higher loss of the global model count more (Li et al. 2020, algorithm 2).

    "Fair Resource Allocation in Federated Learning". With F_k the loss of the global model on
    client k's examples and d_k its delta, the model moves by sum_k F_k^q L d_k / sum_k h_k, where
    h_k = q F_k^(q-1) L^2 |d_k|^2 + L F_k^q: the paper's update with its Delta w_k = -L d_k. All
    clients count the same otherwise.

    Args:
        q: 0 is the plain mean; the larger, the more even the clients' losses.
        lipschitz: the paper's L; 0: 1 / --lr, as the paper has it. A schedule or an adjustment of
            the rate doesn't change it.
        settings: the run's; clients must report the loss (--evaluate-on-clients).
    """
    if not 0 <= q < math.inf or not 0 <= lipschitz < math.inf:
        raise InvalidInput(f"q is {q:g}, lipschitz {lipschitz:g}; neither may be below 0")
    if not settings.evaluate_on_clients:
        raise InvalidInput(
            "strategy qfedavg needs the loss of the global model on each client's data; add "
            "--evaluate-on-clients"
        )
    smoothness = lipschitz or 1 / settings.lr

    def powers(loss: float) -> tuple[float, float]:
        """Return F^q and its derivative."""
        return loss**q, q * (max(loss, _LEAST_LOSS) if q < 1 else loss) ** (q - 1)

    def unmet(_: int, loss: float | None) -> str:
        if loss is None or not 0 <= loss < math.inf:
            return (
                "qfedavg needs each client's loss of the global model, finite and not below 0; "
                f"this update came with {loss}"
            )
        try:
            if max(powers(loss)) < _MAX_POWER:
                return ""
        except (OverflowError, ZeroDivisionError):
            pass
        return f"qfedavg with q {q:g} has no weight for a loss of the global model of {loss:g}"

    def weigh(cohort: Cohort) -> Weights:
        norms = squared_norms(cohort).tolist()
        moves, steps = [], []
        try:
            for update, norm in zip(cohort.updates, norms, strict=True):
                assert update.global_loss is not None
                power, slope = powers(update.global_loss)
                moves.append(power * smoothness)
                steps.append(slope * smoothness**2 * norm + moves[-1])
            total, of_updates = math.fsum(steps), math.fsum(moves)
        except OverflowError:
            total = math.inf
        if not total < math.inf:
            raise UnfitCohort(
                f"qfedavg's weights, with q {q:g} and L {smoothness:g}, are beyond what float64 "
                "holds; give a smaller q or lipschitz"
            )
        if total == 0:
            # All losses are 0: the model stays where it is.
            return Weights(moves, 1.0, of_base=1.0)
        return Weights(moves, total, of_base=total - of_updates)

    return WeightedAggregator(aggregator=mean_by(weigh, unmet), unmet=unmet)


def fednova(*, settings: StrategySettings) -> WeightedAggregator:
    """Divide each delta by the norm of its effective local steps (Wang et al. 2020).

    "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", equation
    7: the model moves by (sum_k p_k a_k) * sum_k p_k d_k / a_k with p_k the share of the examples.
    a_k is the number of local steps for plain SGD, and with momentum rho the L1 norm that the paper
    gives in section 4: (s - rho (1 - rho^s) / (1 - rho)) / (1 - rho) for s steps. All steps count
    the same: a rate that a schedule or a client's doctor changes within a round has no effect on
    a_k.

    Args:
        settings: the run's; the local optimizer must be SGD, its momentum is --momentum.
    """
    if settings.optimizer != "sgd":
        raise InvalidInput(
            f"strategy fednova is defined for local SGD, but --optimizer is "
            f"{settings.optimizer}; give --optimizer sgd or another strategy"
        )
    momentum = settings.momentum

    def unmet(num_steps: int, _: float | None) -> str:
        if num_steps >= 1:
            return ""
        return f"fednova divides by the local steps, but this update has {num_steps}"

    def weigh(cohort: Cohort) -> Weights:
        total = sum(update.num_examples for update in cohort.updates)
        norms = [effective_steps(update.num_steps, momentum) for update in cohort.updates]
        shares = [update.num_examples / total for update in cohort.updates]
        mean_norm = math.fsum(p * a for p, a in zip(shares, norms, strict=True))
        moves = [mean_norm * p / a for p, a in zip(shares, norms, strict=True)]
        return Weights(moves, 1.0, of_base=1 - math.fsum(moves))

    return WeightedAggregator(aggregator=mean_by(weigh, unmet), unmet=unmet)


def weighted_sum(
    cohort: Cohort, weights: Weights, *, reader: BlockReader, accumulator: torch.Tensor
) -> BlockFunction:
    """Return a function that computes the blocks of a weighted mean, in `accumulator`.

    It adds weight * value in float64, in the order of `updates`, and divides once. The product of
    an integer weight below 2^29 and a float32 or narrower value is exact (29 + 24 bits fit in 53),
    so fused and unfused arithmetic agree. For all other products it rounds after the multiplication
    and after the addition, for the same reason. So the bytes depend on the arguments alone.
    """
    terms = [(cohort.base, weights.of_base), *zip(cohort.updates, weights.of_updates, strict=True)]
    terms = [(file, weight) for file, weight in terms if weight != 0]

    def compute(block: Block) -> torch.Tensor:
        # Begin with -0.0, the neutral element of addition: with +0.0 a mean of -0.0 would be +0.0.
        mean = accumulator[: block.count].fill_(-0.0)
        for file, weight in terms:
            values = reader.read(file, block)
            if isinstance(weight, int) and values.dtype is not torch.float64:
                mean.add_(values, alpha=weight)
            else:
                mean.add_(values.double().mul_(weight))
        return mean.div_(weights.total)

    return compute


def mean_by(weigh: Callable[[Cohort], Weights], unmet: Requirement = no_requirement) -> Aggregator:
    """Return an aggregator that weights parameters by `weigh` and float buffers by num_examples.

    `weigh` is called once a round with the whole cohort, and may raise UnfitCohort. An update for
    which `unmet` returns a sentence raises UnfitCohort before that.
    """

    def prepare(cohort: Cohort) -> Callable[[], BlockFunction]:
        for update in cohort.updates:
            if reason := unmet(update.num_steps, update.global_loss):
                raise UnfitCohort(f"{reason} ({update.path.name})")
        of_buffers = _by_num_examples(cohort)
        of_parameters = of_buffers if weigh is _by_num_examples else weigh(cohort)

        def begin() -> BlockFunction:
            reader, accumulator = BlockReader(), torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)
            parameters, buffers = (
                weighted_sum(cohort, weights, reader=reader, accumulator=accumulator)
                for weights in (of_parameters, of_buffers)
            )

            def compute(block: Block) -> torch.Tensor:
                is_parameter = cohort.kinds[block.name] is EntryKind.PARAMETER
                return parameters(block) if is_parameter else buffers(block)

            return compute

        return begin

    return prepare


def _by_num_examples(cohort: Cohort) -> Weights:
    weights = [update.num_examples for update in cohort.updates]
    return Weights(weights, sum(weights))

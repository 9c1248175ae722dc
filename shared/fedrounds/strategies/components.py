"""The components of a strategy, one class for each kind, and the whole strategy.

A component is made by a function with keyword parameters. If the function has a parameter
`settings`, it is called with the run's `StrategySettings`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedrounds.errors import FederationError
from fedrounds.strategies.blocks import Aggregator
from fedrounds.types import ClientAlgorithmConfig, TrainingConfig

Matrix = npt.NDArray[np.float64]


class UnfitCohort(FederationError):
    """A strategy can't be applied to these updates; the attempt at the round fails."""


_TRAINING = TrainingConfig()


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """The settings of a run that a strategy may rest on.

    `optimizer`, `lr` and `momentum` are those of local training (--optimizer, --lr, --momentum).
    `num_partitions` is the number of parts of a simulation's data (--num-partitions), 0 if it isn't
    known. `evaluate_on_clients`: clients report their loss of the global model.
    """

    optimizer: str = _TRAINING.optimizer
    lr: float = _TRAINING.lr
    momentum: float = _TRAINING.momentum
    num_partitions: int = 0
    evaluate_on_clients: bool = False


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A linear map of a cohort's updates, given by its coefficients.

    `apply` takes the squared L2 distances between the global model and m updates, [m + 1, m + 1]
    with the global model first, and a seed. It returns coefficients [k, m + 1] whose rows sum to 1:
    one row for each of the k updates that come out. If `needs_distances` is false, the distances
    may be all 0.
    """

    apply: Callable[[Matrix, int], Matrix]
    needs_distances: bool = True


Reduction = Callable[[Matrix], Matrix]
"""Coordinate-wise: the updates' values ascending, [count, num_updates] -> float64 [count]."""


Requirement = Callable[[int, float | None], str]
"""Says in a sentence why a strategy can't weigh an update; "" if it can.

The arguments are the update's num_steps and its client's loss of the global model (None: the client
reported none).
"""


def no_requirement(_: int, __: float | None) -> str:
    """Return "": the strategy can weigh any update."""
    return ""


@dataclass(frozen=True, kw_only=True)
class WeightedAggregator:
    """An aggregator that weights each update by what its client reports, such as num_examples.

    With a `buffer_size` above 0 it is asynchronous: a round is a buffer of that many updates, which
    may have begun with older models (see fedrounds.strategies.fedbuff). With 0, all updates begin
    with the same model. The server refuses an update for which `unmet` returns a sentence.
    """

    aggregator: Aggregator
    buffer_size: int = 0
    unmet: Requirement = no_requirement


@dataclass(frozen=True, kw_only=True)
class RobustAggregator:
    """An aggregator that gives every update the same weight: `select` some, then `reduce` them.

    If `select` is None, all updates stay as they are. If several are left, `reduce` makes a single
    update of them. `reduce` always applies to the float buffers of all updates. It needs
    `min_updates` updates.
    """

    reduce: Reduction
    select: LinearMap | None = None
    min_updates: int = 1


@dataclass(frozen=True, kw_only=True)
class PreAggregator:
    """A step before a RobustAggregator.

    `min_updates` takes the number of updates that must come out, and returns how many must come in.
    `bounds_updates`: after this step no single update can do much harm, so the plain mean may
    follow and is the default. After any other, the strategy must name a robust aggregator.
    """

    linear_map: LinearMap
    min_updates: Callable[[int], int]
    bounds_updates: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """How the global model follows the pseudo-gradient: the aggregate minus the global model.

    `initial` is the first value of each moment. `step` takes the pseudo-gradient, float64 [count],
    and the moments, float64 [count, num_moments]. It returns the change of the model and the new
    moments. Only parameters have moments.
    """

    initial: tuple[float, ...]
    step: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class ClientAlgorithm:
    """What clients do other than plain training; `config` is sent with every order.

    `server_optimizer` takes the number of updates that count and returns the optimizer that belongs
    to the algorithm at the server. With a `control_share`, clients send the changes of their
    control variates in a section of their own. The server adds their plain mean, times
    control_share(number of updates), to its state, which clients get with their orders.

    `only_behind` names the aggregators that may precede it; the default aggregator is then uniform.
    `not_behind` maps the components that may not precede it to the reason.
    `keeps_entries_local`: clients keep entries of their own, so nobody uses the global model alone.
    `needs_norms`: the task's model must have normalisation layers. `needs_whole_model`: the server
    must aggregate every parameter.
    """

    config: ClientAlgorithmConfig
    server_optimizer: Callable[[int], ServerOptimizer] | None = None
    control_share: Callable[[int], float] | None = None
    only_behind: frozenset[str] | None = None
    not_behind: Mapping[str, str] = field(default_factory=dict)
    keeps_entries_local: bool = False
    needs_norms: bool = False
    needs_whole_model: bool = False

    @property
    def sends_control(self) -> bool:
        """Whether control variates travel beside the model, in both directions."""
        return self.control_share is not None


Component = (
    WeightedAggregator | RobustAggregator | PreAggregator | ServerOptimizer | ClientAlgorithm
)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How clients train, and how the updates of a cohort become the next global model.

    `min_updates` is the smallest cohort it works with. `buffer_size` is the size of an asynchronous
    strategy's buffer (0: it is synchronous). `unmet` says why it can't weigh an update.
    """

    name: str
    aggregator: Aggregator
    server_optimizer: ServerOptimizer | None = None
    client_algorithm: ClientAlgorithm | None = None
    min_updates: int = 1
    buffer_size: int = 0
    unmet: Requirement = no_requirement

    @property
    def keeps_entries_local(self) -> bool:
        """Whether clients keep entries of their own, so that nobody uses the global model alone."""
        return self.client_algorithm is not None and self.client_algorithm.keeps_entries_local

    def optimizer_for(self, num_updates: int) -> ServerOptimizer | None:
        """Return the server optimizer of a round in which `num_updates` updates count.

        Raises:
            UnfitCohort: the client algorithm doesn't allow that many.
        """
        algorithm = self.client_algorithm
        if algorithm is not None and algorithm.server_optimizer is not None:
            return algorithm.server_optimizer(num_updates)
        return self.server_optimizer

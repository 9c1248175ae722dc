"""What a strategy is put together from: the kinds of rows, and what a whole one is.

A row of the table is a function with parameters by name that returns one of these. The parameter
`settings`, where a function has it, are the run's settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedrounds.errors import FederationError
from fedrounds.strategies.blocks import Aggregator
from fedrounds.types import LocalRule

Matrix = npt.NDArray[np.float64]


class UnfitCohort(FederationError):
    """A strategy can't be applied to these updates; the attempt at the round fails."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A linear step from points to points, told by coefficients.

    `apply` gets the squared L2 distances between the global model and m updates, [m + 1, m + 1]
    with the global model first, and a seed; it returns coefficients [k, m + 1] whose rows sum to 1,
    the k updates that come out. Where it doesn't need distances they may be all 0.
    """

    apply: Callable[[Matrix, int], Matrix]
    needs_distances: bool = True


Reduction = Callable[[Matrix], Matrix]
"""Coordinate-wise: the updates' values ascending, [count, num_updates] -> float64 [count]."""


Lack = Callable[[int, float | None], str]
"""What an update lacks that its weight rests on, in a sentence; "" if nothing.

Told its num_steps and its client's loss of the global model, None if the client told none.
"""


def lacks_nothing(_: int, __: float | None) -> str:
    """Return that any update will do."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """An aggregator that weighs the updates by what their clients say of them.

    One with a `buffer_size` is asynchronous: a round is a buffer of so many updates, which may have
    begun with older models (see fedrounds.strategies.fedbuff). 0: all begin with the same one. An
    update of which `lacks` says something is refused when it comes.
    """

    aggregator: Aggregator
    buffer_size: int = 0
    lacks: Lack = lacks_nothing


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An aggregator to which all updates count the same: `select` some, then `reduce` them.

    `select` leaves all as they are if it is None. Where it leaves more than one, `reduce` makes one
    of them, and in any case of the float buffers of all. `min_updates` is how many it takes.
    """

    reduce: Reduction
    select: Step | None = None
    min_updates: int = 1


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """A step before a Rule; `min_updates` says how many it takes for that many to come out.

    `bounds_updates`: after it no single update can do much harm, so that the plain mean follows
    where no rule is named. After others one must be.
    """

    step: Step
    min_updates: Callable[[int], int]
    bounds_updates: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """How the model follows the pseudo-gradient, the aggregate minus the global model.

    `initial` is what each moment of a parameter begins with. `step` gets the pseudo-gradient,
    float64 [count], and the moments, float64 [count, num_moments], and returns by how much the
    model moves and the moments after. Momenta are kept for parameters alone.
    """

    initial: tuple[float, ...]
    step: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Local:
    """What clients do otherwise than plain training: `rule` is sent with every order.

    `server_optimizer` is what belongs to it at the server, told how many updates count. With a
    `control_share` clients send control variates' changes in a section of their own; their plain
    mean, times the share that belongs to the number of updates, is added to the server state,
    which clients get with their orders. `only_behind` names the aggregators it makes sense with;
    without one named it is uniform then. `not_behind` names those it makes none with, and why.
    `is_personal`: the global model alone is none that anybody uses. `needs_norms`: the task's model
    must have normalisation layers. `needs_whole_model`: the server must aggregate each parameter.
    """

    rule: LocalRule
    server_optimizer: Callable[[int], ServerOptimizer] | None = None
    control_share: Callable[[int], float] | None = None
    only_behind: frozenset[str] | None = None
    not_behind: Mapping[str, str] = field(default_factory=dict)
    is_personal: bool = False
    needs_norms: bool = False
    needs_whole_model: bool = False

    @property
    def sends_control(self) -> bool:
        """Whether control variates go both ways beside the model."""
        return self.control_share is not None


Part = Mean | Rule | Mixing | ServerOptimizer | Local


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How clients train, and how a cohort's updates become the next global model.

    `min_updates` is the smallest cohort it makes sense for, `buffer_size` that of an asynchronous
    one's buffer (0: it is synchronous), `lacks` says which updates it can't weigh.
    """

    name: str
    aggregator: Aggregator
    server_optimizer: ServerOptimizer | None = None
    local: Local | None = None
    min_updates: int = 1
    buffer_size: int = 0
    lacks: Lack = lacks_nothing

    @property
    def is_personal(self) -> bool:
        """Whether the global model alone is none that anybody uses."""
        return self.local is not None and self.local.is_personal

    def optimizer_for(self, num_updates: int) -> ServerOptimizer | None:
        """Return the server optimizer of a round in which so many updates count.

        Raises:
            UnfitCohort: there can't be so many.
        """
        if self.local is not None and self.local.server_optimizer is not None:
            return self.local.server_optimizer(num_updates)
        return self.server_optimizer

"""The facts of one run. Its resources are passed as arguments of their own."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from fedrounds.strategies.components import Strategy, StrategySettings
from fedrounds.strategies.registry import find_strategy
from fedrounds.training.metrics import MetricFactory
from fedrounds.types import EntryKind
from fedserver.records import Run
from fedserver.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The facts of one run.

    `strategy` is what the settings name. `kinds` are of the entries of the model's state_dict,
    `ties` name the earlier entry that an entry is the same tensor as, `variances` are the running
    variances of norm layers, `modules` are the dotted names of the model's modules. `metrics` are
    the task's own, `measurement_sizes` how many numbers clients report of them under each name.
    """

    settings: ServerSettings
    run: Run
    strategy: Strategy
    kinds: Mapping[str, EntryKind]
    ties: Mapping[str, str]
    variances: Set[str]
    modules: Set[str]
    metrics: Mapping[str, MetricFactory] = field(default_factory=dict)
    measurement_sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.run.run_id


def strategy_of(settings: ServerSettings) -> Strategy:
    """Return the strategy that a run's settings name.

    Raises:
        InvalidInput: see `find_strategy`.
    """
    return find_strategy(
        settings.strategy,
        settings.strategy_parameters,
        settings=StrategySettings(
            optimizer=settings.optimizer,
            lr=settings.lr,
            momentum=settings.momentum,
            num_partitions=settings.num_partitions,
            evaluate_on_clients=settings.evaluate_on_clients,
        ),
    )

"""How a cohort's updates become the next global model, and the classes for your own components.

`fedrounds.strategies.registry` has the table of all components; examples/own_strategy.py adds two.
"""

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.components import (
    ClientAlgorithm,
    Component,
    LinearMap,
    Matrix,
    PreAggregator,
    RobustAggregator,
    ServerOptimizer,
    Strategy,
    StrategySettings,
    UnfitCohort,
    WeightedAggregator,
)
from fedrounds.strategies.means import Weights, mean_by

__all__ = [
    "ClientAlgorithm",
    "Cohort",
    "Component",
    "LinearMap",
    "Matrix",
    "PreAggregator",
    "RobustAggregator",
    "ServerOptimizer",
    "Strategy",
    "StrategySettings",
    "UnfitCohort",
    "WeightedAggregator",
    "Weights",
    "mean_by",
]

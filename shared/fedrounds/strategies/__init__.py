"""What the server makes of a cohort's updates, and what a strategy of your own is made of.

`fedrounds.strategies.registry` has the table of all strategies; examples/own_strategy.py adds two.
"""

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.components import (
    Local,
    Matrix,
    Mean,
    Mixing,
    Part,
    Rule,
    ServerOptimizer,
    Step,
    Strategy,
    UnfitCohort,
)
from fedrounds.strategies.means import Weights, mean_by

__all__ = [
    "Cohort",
    "Local",
    "Matrix",
    "Mean",
    "Mixing",
    "Part",
    "Rule",
    "ServerOptimizer",
    "Step",
    "Strategy",
    "UnfitCohort",
    "Weights",
    "mean_by",
]

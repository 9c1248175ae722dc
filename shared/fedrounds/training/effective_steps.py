"""Effective steps: how far steps of SGD with momentum move a parameter, in steps without momentum.

With momentum m, equal gradients of 1 move it by 1, 1 + m, 1 + m + m^2, ... times the learning rate.
The sum over all steps is FedNova's |a_i|_1 (Wang et al. 2020, "Tackling the Objective Inconsistency
Problem in Heterogeneous Federated Optimization", section 4).
"""


def effective_steps(num_steps: int, momentum: float) -> float:
    """Return the number of effective steps of `num_steps` steps with the same learning rate."""
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)


class EffectiveSteps:
    """Sums effective steps times their learning rates, for rates that change."""

    def __init__(self, momentum: float) -> None:
        self.total = 0.0
        self._momentum = momentum
        self._velocity = 0.0

    def add(self, lr: float) -> None:
        """Add a step with this learning rate."""
        self._velocity = self._momentum * self._velocity + 1
        self.total += lr * self._velocity

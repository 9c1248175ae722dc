"""How far steps of SGD with momentum move a parameter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.training.effective_steps import EffectiveSteps, effective_steps


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_they_are_how_far_a_gradient_of_one_moves_a_parameter(
    num_steps: int, momentum: float
) -> None:
    """Torch's own SGD with a learning rate of 1 is the oracle."""
    moved = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([moved], lr=1.0, momentum=momentum)
    for _ in range(num_steps):
        moved.grad = -torch.ones(1, dtype=torch.float64)
        optimizer.step()
    assert effective_steps(num_steps, momentum) == pytest.approx(moved.item(), rel=1e-12)


@given(num_steps=st.integers(0, 300), momentum=st.floats(0, 0.99), lr=st.floats(1e-3, 1))
def test_step_by_step_it_is_the_same_sum(num_steps: int, momentum: float, lr: float) -> None:
    """With a rate that doesn't change, the sum is the rate times the closed form."""
    steps = EffectiveSteps(momentum)
    for _ in range(num_steps):
        steps.add(lr)
    assert steps.total == pytest.approx(lr * effective_steps(num_steps, momentum), rel=1e-9)

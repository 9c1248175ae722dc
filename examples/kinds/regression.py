"""Regression with one target and with several: the loss compares numbers; there are no classes."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int, num_targets: int) -> TensorDataset:
    """Return inputs float32 [120, 4] and targets float32 [120, num_targets]."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(120, 4, generator=rng)
    slopes = torch.arange(4.0 * num_targets).reshape(4, num_targets).cos()
    noise = 0.1 * torch.randn(120, num_targets, generator=rng)
    return TensorDataset(inputs, inputs @ slopes + noise)


def regression(num_targets: int) -> Task:
    """Return the task with so many targets."""
    return Task(
        name="regression",
        build_model=lambda: nn.Linear(4, num_targets),
        load_train=lambda request: draw(seed_of(request), num_targets),
        load_test=lambda _: draw(0, num_targets),
        loss=nn.functional.mse_loss,
    )


one_target = regression(1)
three_targets = regression(3)

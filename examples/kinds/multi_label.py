"""Multi-label: each of three properties is there or not; targets are floats of 0 and 1."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return inputs float32 [160, 6] and targets float32 [160, 3]."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(160, 6, generator=rng)
    return TensorDataset(inputs, (inputs[:, :3] + inputs[:, 3:] > 0).float())


task = Task(
    name="multi-label",
    build_model=lambda: nn.Linear(6, 3),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    loss=nn.functional.binary_cross_entropy_with_logits,
)

"""An autoencoder: an example is its own target, so there is none, and a batch is a list of one."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return points float32 [160, 8] of a plane."""
    rng = torch.Generator().manual_seed(seed)
    plane = torch.randn(2, 8, generator=torch.Generator().manual_seed(99))
    return TensorDataset(torch.randn(160, 2, generator=rng) @ plane)


def training_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean squared error of the reconstruction."""
    (points,) = batch
    return nn.functional.mse_loss(model(points), points)


task = Task(
    name="autoencoder",
    build_model=lambda: nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    training_step=training_step,
)

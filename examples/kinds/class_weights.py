"""Class weights: a mistake about the rare class costs more."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task

WEIGHTS = (0.2, 1.0)


def draw(seed: int) -> TensorDataset:
    """Return inputs float32 [200, 2] and labels int64 [200], a sixth of them 1."""
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.rand(200, generator=rng) < 1 / 6).long()
    return TensorDataset(torch.randn(200, 2, generator=rng) + 2 * labels[:, None], labels)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the weighted cross-entropy; its weights are on the outputs' device."""
    return nn.functional.cross_entropy(outputs, targets, outputs.new_tensor(WEIGHTS))


task = Task(
    name="class-weights",
    build_model=lambda: nn.Linear(2, 2),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    loss=loss,
)

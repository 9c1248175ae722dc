"""Binary classification with one logit; the model's output [n, 1] is squeezed in the loss."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return inputs float32 [160, 4] and answers, int64 [160], 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(160, 4, generator=rng)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy."""
    return nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


task = Task(
    name="one-logit",
    build_model=lambda: nn.Linear(4, 1),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    loss=loss,
)

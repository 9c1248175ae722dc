"""Examples of three tensors: input, label, and how much the label can be trusted."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return inputs float32 [160, 3], kinds int64 [160] and trust float32 [160], from 0 to 1."""
    rng = torch.Generator().manual_seed(seed)
    inputs, trust = torch.randn(160, 3, generator=rng), torch.rand(160, generator=rng)
    return TensorDataset(inputs, inputs.argmax(1), trust)


def training_step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss weighted by trust, and the logits."""
    inputs, kinds, trust = batch
    logits = model(inputs)
    losses = nn.functional.cross_entropy(logits, kinds, reduction="none")
    return (losses * trust).sum() / trust.sum(), logits


task = Task(
    name="three-tensors",
    build_model=lambda: nn.Linear(3, 3),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    training_step=training_step,
    num_classes=3,
)

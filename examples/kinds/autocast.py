"""Autocast: the forward pass in bfloat16, the weights and the loss in float32."""

import torch
from torch import Tensor, nn

from examples.kinds import seed_of
from examples.kinds.tuple_outputs import draw
from fedrounds import Task


def training_step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the logits."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = model(inputs)
    return nn.functional.cross_entropy(logits.float(), targets), logits


task = Task(
    name="autocast",
    build_model=lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    training_step=training_step,
    num_classes=3,
)

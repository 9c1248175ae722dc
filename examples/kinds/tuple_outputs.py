"""A model with two heads: its outputs are a tuple, whose first part answers the targets."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return inputs float32 [160, 4] and kinds int64 [160], the largest of the first three."""
    inputs = torch.randn(160, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class TwoHeads(nn.Module):
    """Takes inputs [n, 4] to (logits [n, 3], logits of an auxiliary head [n, 3])."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return both heads' logits."""
        hidden = self.body(inputs)
        return self.main(hidden), self.aux(hidden)


def loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Return the main head's loss and a part of the auxiliary head's."""
    return sum(  # type: ignore[return-value]  # two tensors
        weight * nn.functional.cross_entropy(logits, targets)
        for weight, logits in zip((0.8, 0.2), outputs, strict=True)
    )


task = Task(
    name="tuple-outputs",
    build_model=TwoHeads,
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    loss=loss,
)

"""Tasks that cost nothing to train, so that a round costs what the service costs.

`changed` gives back a model of FED_BENCH_MB megabytes (default 0.004) with every tensor changed.
"""

import os

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedrounds.tasks.task import Task

_TENSOR_ELEMENTS = 1_000_000


class ChangedModel(nn.Module):
    """Parameters that no gradient reaches; each forward pass in training changes all of them."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        num_elements = max(1, num_bytes // 4)
        sizes = [_TENSOR_ELEMENTS] * (num_elements // _TENSOR_ELEMENTS)
        sizes.append(num_elements % _TENSOR_ELEMENTS)
        self.ballast = nn.ParameterList(
            nn.Parameter(torch.full((size,), 0.5), requires_grad=False) for size in sizes if size
        )
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs [batch, 2] for inputs [batch, 1]."""
        if self.training:
            with torch.no_grad():
                for parameter in self.ballast:
                    parameter.add_(1e-3)
        return inputs.expand(-1, 2) + self.bias


def _build() -> ChangedModel:
    return ChangedModel(int(float(os.environ.get("FED_BENCH_MB", "0.004")) * 1e6))


def _two_examples() -> TensorDataset:
    return TensorDataset(torch.zeros(2, 1), torch.tensor([0, 1]))


changed = Task(
    name="benchmarks.tasks:changed",
    build_model=_build,
    load_train=lambda _: _two_examples(),
    load_test=lambda _: None,
    loss=nn.functional.cross_entropy,
)

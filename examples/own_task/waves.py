"""An own task, whole: three kinds of waves, told apart by a convolution over time."""

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from fedrounds import DataRequest, Task, need_root


def build_model() -> nn.Module:
    """Return a model from waves [n, 1, 64] to logits [n, 3]."""
    return nn.Sequential(nn.Conv1d(1, 8, 9), nn.MaxPool1d(14), nn.Flatten(), nn.Linear(32, 3))


def draw_waves(seed: int, num: int) -> TensorDataset:
    """Return waves float32 [num, 1, 64] and their kinds int64 [num]: sine, square, sawtooth."""
    rng = torch.Generator().manual_seed(seed)
    phase = (torch.rand(num, 1, 1, generator=rng) + torch.linspace(0, 3, 64)) % 1
    kinds = torch.randint(3, (num,), generator=rng)
    shapes = torch.stack([(2 * torch.pi * phase).sin(), (0.5 - phase).sign(), 2 * phase - 1])
    return TensorDataset(torch.normal(shapes[kinds, torch.arange(num)], 0.6, generator=rng), kinds)


def load_train(request: DataRequest) -> TensorDataset:
    """Return one client's examples: its own file, or its share of a simulation."""
    if request.partition is not None:
        return draw_waves(seed=1 + request.partition.index, num=300)
    own = load_file(need_root("waves", request.data_root) / "waves.safetensors")
    return TensorDataset(own["waves"], own["kinds"])


waves = Task(
    name="waves",
    build_model=build_model,
    load_train=load_train,
    load_test=lambda _: draw_waves(seed=0, num=600),
    loss=nn.functional.cross_entropy,
)

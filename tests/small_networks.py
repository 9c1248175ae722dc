"""Small networks with something planted in them, and what a step with them is made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Origin
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.locate import Fault

Forward = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A module without weights that applies a function."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply it."""
        return self.function(inputs)


def network(middle: nn.Module | None = None) -> nn.Sequential:
    """Return 4 inputs, 6 hidden, something in the middle, 3 outputs; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), middle or nn.ReLU(), nn.Linear(6, 3))


def samples() -> tuple[Tensor, Tensor]:
    """Return ordinary inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator), torch.arange(8) % 3


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return inputs and labels."""
    assert isinstance(batch, tuple)
    inputs, labels = batch
    return inputs, labels


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's outputs."""
    outputs = model(pair(batch)[0])
    assert isinstance(outputs, Tensor)
    return outputs


def hidden_of(model: nn.Module, batch: Batch, *, last: int) -> Tensor:
    """Return what the first layers make of the inputs, the model not being called as a whole."""
    hidden = pair(batch)[0]
    for number in range(last + 1):
        hidden = model.get_submodule(str(number))(hidden)
    return hidden


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by its name."""
    return model.get_parameter(name)


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the usual loss, and the outputs."""
    inputs, labels = pair(batch)
    outputs = model(inputs)
    return F.cross_entropy(outputs, labels), outputs


def origin_of(fault: Fault | None) -> Origin:
    """Return the origin of a fault that must have been located."""
    assert fault is not None
    return fault.origin


def where(fault: Fault | None) -> tuple[str, str, str]:
    """Return phase, module and operation of a fault."""
    origin = origin_of(fault)
    return origin.phase.value, origin.module, origin.operation


def small(values: Tensor) -> Tensor:
    """Return these values in [0, 1] with a single exact zero, at [2, 1]."""
    is_zero = torch.zeros_like(values, dtype=torch.bool)
    is_zero[2, 1] = True
    return values.sigmoid().masked_fill(is_zero, 0.0)


def near(values: Tensor) -> Tensor:
    """Return these values in [0, 1] with an exact zero at [2, 1] whose derivative isn't cut off."""
    factor = torch.ones_like(values)
    factor[2, 1] = 0
    return values.sigmoid() * factor

"""What a client algorithm adds to the gradients of a training.

The correction depends on the parameters and on constants alone, and is added in the optimizer's
step. So the doctor's replays repeat it bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Replaces each gradient by gradient + shift + pull * (parameter - anchor).

    It is added after clipping, as weight decay is, and only to trainable parameters. `anchor` and
    `shift` hold a tensor of each parameter's shape, by name. The default anchor is the model at the
    start of training, the default shift 0.
    """

    pull: float = 0.0
    anchor: Mapping[str, Tensor] | None = None
    shift: Mapping[str, Tensor] | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether it leaves gradients unchanged."""
        return self.pull == 0 and not self.shift


def correct_gradients(optimizer: Optimizer, model: nn.Module, correction: Correction) -> None:
    """Add a correction at each step of the optimizer; the model now is the default anchor."""
    if correction.is_nothing:
        return
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    trainable = list(named.values())
    anchors = [] if correction.pull == 0 else _copies(named, correction.anchor or named)
    shifts = _copies(named, correction.shift) if correction.shift else []

    def add(*_: object) -> None:
        indices = [index for index, tensor in enumerate(trainable) if tensor.grad is not None]
        gradients = [grad for index in indices if (grad := trainable[index].grad) is not None]
        # Convert the constants: the doctor may have made the parameters wider meanwhile.
        if anchors:
            parameters = [trainable[index].detach() for index in indices]
            away = torch._foreach_sub(parameters, _as_wide(anchors, indices, parameters))
            torch._foreach_add_(gradients, away, alpha=correction.pull)
        if shifts:
            torch._foreach_add_(gradients, _as_wide(shifts, indices, gradients))

    optimizer.register_step_pre_hook(add)


def _copies(named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> list[Tensor]:
    return [
        values[name].detach().to(parameter.device, parameter.dtype, copy=True)
        for name, parameter in named.items()
    ]


def _as_wide(constants: list[Tensor], indices: list[int], like: list[Tensor]) -> list[Tensor]:
    return [constants[index].to(tensor.dtype) for index, tensor in zip(indices, like, strict=True)]

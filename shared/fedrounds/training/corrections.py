"""What a client algorithm adds to the gradients of a training.

It is a function of the parameters and of constants alone, and is added in the optimizer's step,
whoever takes it: so the doctor's replays repeat it bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Correction:
    """gradient + shift + pull * (parameter - anchor) takes the gradient's place.

    It is added behind clipping, as weight decay is, and to parameters that learn alone. `anchor`
    and `shift` are by parameter, of its shape: the anchor is by default where training begins, the
    shift 0.
    """

    pull: float = 0.0
    anchor: Mapping[str, Tensor] | None = None
    shift: Mapping[str, Tensor] | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether gradients stay as they are."""
        return self.pull == 0 and not self.shift


def correct_gradients(optimizer: Optimizer, model: nn.Module, correction: Correction) -> None:
    """Make each of the optimizer's steps add a correction first; the model is where it begins."""
    if correction.is_nothing:
        return
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    learning = list(named.values())
    anchors = [] if correction.pull == 0 else _copies(named, correction.anchor or named)
    shifts = _copies(named, correction.shift) if correction.shift else []

    def add(*_: object) -> None:
        places = [place for place, one in enumerate(learning) if one.grad is not None]
        gradients = [one for place in places if (one := learning[place].grad) is not None]
        # The doctor may have made the parameters wider meanwhile.
        if anchors:
            parameters = [learning[place].detach() for place in places]
            away = torch._foreach_sub(parameters, _as_wide(anchors, places, parameters))
            torch._foreach_add_(gradients, away, alpha=correction.pull)
        if shifts:
            torch._foreach_add_(gradients, _as_wide(shifts, places, gradients))

    optimizer.register_step_pre_hook(add)


def _copies(named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> list[Tensor]:
    return [
        values[name].detach().to(one.device, one.dtype, copy=True) for name, one in named.items()
    ]


def _as_wide(constants: list[Tensor], places: list[int], like: list[Tensor]) -> list[Tensor]:
    return [constants[place].to(one.dtype) for place, one in zip(places, like, strict=True)]

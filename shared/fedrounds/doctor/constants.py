"""Constants of an optimizer's own with which no training is stable, whatever its gradients are."""

from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, AdamW, Optimizer

_USUAL_MOMENTUM = 0.9


def unstable_constant(optimizer: Optimizer) -> float | None:
    """Return the first constant that lets weights grow by themselves, None if none does.

    A momentum of 1 or more. Or the product of rate and weight decay, where a step multiplies
    weights by less than -1: with a momentum m that is so from 2 (1 + m) on, the bound of
    gradient descent with momentum (Polyak, 1964); with a decoupled decay, such as AdamW's, from 2
    on. Of the decay of other optimizers nothing is claimed: most divide it by the gradient's size.
    """
    for group in optimizer.param_groups:
        momentum = _momentum(group)
        if momentum >= 1:
            return momentum
        if _is_decay_unstable(optimizer, group):
            return float(group["lr"]) * float(group["weight_decay"])
    return None


def make_stable(optimizer: Optimizer) -> None:
    """Give the groups the usual momentum and no decay, where theirs are unstable."""
    for group in optimizer.param_groups:
        if _momentum(group) >= 1:
            group["momentum"] = _USUAL_MOMENTUM
        if _is_decay_unstable(optimizer, group):
            group["weight_decay"] = 0.0


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group.get("momentum", 0.0))


def _is_decay_unstable(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    is_decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
    if not is_decoupled and not isinstance(optimizer, SGD):
        return False
    product = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    return product > 2 * (1 + _momentum(group))

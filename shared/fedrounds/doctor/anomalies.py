"""Whether weights or an optimizer's state are unlike what they usually are."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrounds.doctor.history import Snapshot
from fedrounds.tensors.entries import running_variances

_RATIO = 10.0
"""An initial weight tensor's root mean square is within this factor of a usual tensor's."""
_RATIO_OTHER = 100.0
_STATE_FACTOR = 100.0


def usual_state(model: nn.Module) -> dict[str, Tensor]:
    """Return initial weights as the model's modules draw them themselves (`reset_parameters`).

    A function of the model's form alone. What a module doesn't reset stays as it is.
    """
    state = {name: entry.detach().clone() for name, entry in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in model.named_modules():
            if not callable(getattr(module, "reset_parameters", None)):
                continue
            # The model itself may hold what can't be copied, such as a Trainer.
            fresh = copy.deepcopy(module)
            fresh.reset_parameters()
            prefix = f"{name}." if name else ""
            state |= {f"{prefix}{key}": entry.detach() for key, entry in fresh.state_dict().items()}
    return state


def unusual_entries(
    model: nn.Module, start: Snapshot, usual: Mapping[str, Tensor], *, is_initial: bool
) -> list[str]:
    """Return the entries of a training's first state that no initialisation or training gives.

    Weights (two or more dimensions) whose root mean square is more than 10 times that of usual
    initial weights or less than a tenth of it, or that are constant where usual weights aren't;
    other entries more than 100 times as large as usual entries, or as 1; negative running variances
    of norm layers.
    """
    variances = running_variances(model)
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers()]
    unusual = []
    for name, tensor in zip(names, start.tensors, strict=True):
        fresh = usual.get(name)
        if fresh is None or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        size, usual_size = _root_mean_square(tensor), _root_mean_square(fresh)
        if tensor.ndim > 1:
            is_constant = tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
            is_usually_constant = bool((fresh == fresh.flatten()[0]).all())
            is_odd = size > _RATIO * usual_size or size < usual_size / _RATIO
            is_odd |= is_constant and not is_usually_constant
        else:
            is_odd = size > _RATIO_OTHER * max(usual_size, 1.0 if not is_initial else 0.1)
            is_odd |= name in variances and bool((tensor < 0).any())
        if is_odd or not math.isfinite(size):
            unusual.append(name)
    return unusual


def has_odd_optimizer_state(snapshot: Snapshot, *, largest_norm: float) -> bool:
    """Whether an optimizer's state is more than gradients of at most this norm can have made it.

    Non-finite, a negative second moment, or larger than 100 times the norm and its square.
    """
    limit = _STATE_FACTOR * max(largest_norm, largest_norm**2, 1.0)
    for state in snapshot.optimizer_state:
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
                continue
            if not bool(value.isfinite().all()) or float(value.abs().max()) > limit:
                return True
            if key in _SQUARES and bool((value < 0).any()):
                return True
    return False


def differ_in_optimizer_state(first: Snapshot, second: Snapshot) -> bool:
    """Whether two states of the same training hold other bits of optimizer history."""
    return any(
        values.keys() != others.keys() or any(not _same(values[key], others[key]) for key in values)
        for values, others in zip(first.optimizer_state, second.optimizer_state, strict=True)
    )


_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf")


def _same(value: Any, other: Any) -> bool:  # noqa: ANN401  # an optimizer's state holds anything
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return bool(torch.equal(value.nan_to_num(), other.nan_to_num()))
    return bool(value == other)


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())

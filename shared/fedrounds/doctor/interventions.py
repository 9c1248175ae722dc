"""The changes that experiments and remedies make to a training, one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedrounds.doctor.batches import Batch, map_tensors
from fedrounds.doctor.history import entries_of
from fedrounds.doctor.replay import Change
from fedrounds.doctor.stepping import NARROW, TrainingState

_USUAL_EPS = 1e-8


def slowing(factor: float) -> Change:
    """Multiply the learning rate."""
    return lambda treatment: replace(treatment, rate_factor=treatment.rate_factor * factor)


def bounding_rate(max_rate: float) -> Change:
    """Take no step at a learning rate above this."""
    return lambda treatment: replace(treatment, max_rate=min(max_rate, treatment.max_rate))


def clipping(norm: float) -> Change:
    """Clip gradients at a global L2 norm."""
    return lambda treatment: replace(treatment, clip_norm=min(norm, treatment.clip_norm or norm))


def skipping(step: int) -> Change:
    """Leave a step's batch out."""
    return lambda treatment: replace(treatment, skips=treatment.skips | {step})


def sanitising(max_input: float) -> Change:
    """Put inputs right instead of leaving samples out."""
    return lambda treatment: replace(
        treatment, sanitises=True, max_input=min(max_input, treatment.max_input)
    )


def guarding_loss() -> Change:
    """Compute the loss where it is defined."""
    return lambda treatment: replace(treatment, guards=True)


def unguarding_loss() -> Change:
    """Compute the loss as it is written."""
    return lambda treatment: replace(treatment, guards=False)


def stabilising() -> Change:
    """Take no step with constants of the optimizer that can't be stable."""
    return lambda treatment: replace(treatment, stabilises=True)


def widening() -> Change:
    """Compute in float32 what is computed in fewer bits; the training is to be widened, too."""
    return lambda treatment: replace(treatment, widens=True)


def widen(training: TrainingState) -> None:
    """Make parameters, buffers and the optimizer's state float32 where they are narrower."""
    _convert(training, lambda tensor: tensor.float() if tensor.dtype in NARROW else tensor)


def double(training: TrainingState) -> None:
    """Make parameters, buffers and the optimizer's state float64."""
    _convert(training, _doubled)


def doubled(batch: Batch) -> Batch:
    """Return a batch with its floating-point tensors in float64."""
    return map_tensors(batch, _doubled)


def forget_history(training: TrainingState) -> None:
    """Empty the optimizer's state, and give it the usual smallest denominator."""
    training.optimizer.state.clear()
    for group in training.optimizer.param_groups:
        if "eps" in group:
            group["eps"] = max(group["eps"], _USUAL_EPS)


def load_weights(training: TrainingState, weights: Mapping[str, Tensor]) -> None:
    """Give the model other weights, and the optimizer no history."""
    forget_history(training)
    named = dict(training.model.named_parameters()) | dict(training.model.named_buffers())
    with torch.no_grad():
        for name, tensor in named.items():
            if name in weights:
                tensor.copy_(weights[name])


def _doubled(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _convert(training: TrainingState, change: Callable[[Tensor], Tensor]) -> None:
    for entry in entries_of(training):
        entry.data = change(entry.data)
        entry.grad = None
    for state in training.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                state[key] = change(value)

"""The optimizers by name, and the schedules of the step size."""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedrounds.errors import InvalidInput
from fedrounds.types import Schedule

T = TypeVar("T", bound=Optimizer)


def _without_compiler(optimizer: type[T]) -> type[T]:
    """Return a class that computes the same and doesn't import torch's compiler.

    Some methods of torch's optimizers import the compiler only to exclude themselves from it. That
    costs 150 MB and seconds of processor time, and is an error if no temporary folder can be
    written to. The work itself is in the functions that these methods wrap.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    # The function that `step` wraps relies on its wrapper for no_grad.
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


_SGD = _without_compiler(SGD)
_Adam = _without_compiler(Adam)
_AdamW = _without_compiler(AdamW)

OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], float, float, float], Optimizer]] = (
    MappingProxyType(
        {
            "sgd": lambda parameters, lr, momentum, weight_decay: _SGD(
                parameters, lr=lr, momentum=momentum, weight_decay=weight_decay
            ),
            # Adam's first beta is its momentum: the same setting, with the same usual value.
            "adam": lambda parameters, lr, momentum, weight_decay: _Adam(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            ),
            "adamw": lambda parameters, lr, momentum, weight_decay: _AdamW(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            ),
        }
    )
)

# share: the part of the way after the warm-up, from 0 to below 1; epoch: from 0.
_DECAYS: Mapping[str, Callable[[Schedule, float, int], float]] = MappingProxyType(
    {
        "constant": lambda schedule, share, epoch: 1.0,
        "step": lambda schedule, share, epoch: schedule.decay ** (epoch // schedule.decay_epochs),
        # Loshchilov, Hutter 2017, "SGDR", equation 5 with eta_min = 0 and one period.
        "cosine": lambda schedule, share, epoch: (1 + math.cos(math.pi * share)) / 2,
    }
)

SCHEDULES = tuple(_DECAYS)


def make_optimizer(
    name: str, parameters: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Return a fresh optimizer; `momentum` is SGD's, or beta_1 of Adam and AdamW.

    Raises:
        InvalidInput: no such optimizer, or a number out of range.
    """
    # Written as 'not in range' so that nan, which is in no range, is refused too.
    if not 0 < lr < math.inf:
        raise InvalidInput(f"lr must be a positive number, but is {lr}")
    if not 0 <= momentum < 1:
        raise InvalidInput(f"momentum must be from 0 to below 1, but is {momentum}")
    if not 0 <= weight_decay < math.inf:
        raise InvalidInput(f"weight_decay must be 0 or a positive number, but is {weight_decay}")
    if name not in OPTIMIZERS:
        raise InvalidInput(f"there is no optimizer {name!r}; there are: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](parameters, lr, momentum, weight_decay)


def lr_factor(schedule: Schedule, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the factor on lr in step `step` (from 0) of a training.

    `epochs` is the number of epochs of this training, and the schedule's length if it names none.
    """
    position = schedule.first_epoch * steps_per_epoch + step
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if position < warmup_steps:
        # Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2, gradual warm-up.
        return (position + 1) / warmup_steps
    total_steps = (schedule.total_epochs or epochs) * steps_per_epoch
    share = (position - warmup_steps) / max(1, total_steps - warmup_steps)
    return _DECAYS[schedule.name](schedule, share, position // steps_per_epoch)


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule, *, steps_per_epoch: int | None, epochs: int
) -> LambdaLR | None:
    """Return the scheduler of the step size, None if the step size never changes.

    It sets the step size of the first step at once; call its `step` after each step of the
    optimizer. `steps_per_epoch` is None if it isn't known.

    Raises:
        InvalidInput: no such schedule, a number out of range, or an unknown number of steps.
    """
    _validate(schedule, epochs=epochs)
    if schedule.name == "constant" and schedule.warmup_epochs == 0:
        return None
    if steps_per_epoch is None:
        raise InvalidInput(
            f"the schedule {schedule.name!r} with warmup_epochs={schedule.warmup_epochs:g} needs a "
            "dataloader that knows its length"
        )
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(schedule, step=step, steps_per_epoch=steps_per_epoch, epochs=epochs),
    )


def _validate(schedule: Schedule, *, epochs: int) -> None:
    if schedule.name not in _DECAYS:
        raise InvalidInput(
            f"there is no schedule {schedule.name!r}; there are: {', '.join(SCHEDULES)}"
        )
    total_epochs = schedule.total_epochs or epochs
    if not 0 <= schedule.first_epoch <= total_epochs - epochs:
        raise InvalidInput(
            f"{epochs} epochs from epoch {schedule.first_epoch} on don't fit into the schedule's "
            f"{total_epochs}"
        )
    if not 0 <= schedule.warmup_epochs < total_epochs:
        raise InvalidInput(
            f"warmup_epochs must be from 0 to below the schedule's {total_epochs} epochs, but is "
            f"{schedule.warmup_epochs}"
        )
    if schedule.decay_epochs < 1:
        raise InvalidInput(f"decay_epochs must be at least 1, but is {schedule.decay_epochs}")
    if not 0 < schedule.decay <= 1:
        raise InvalidInput(f"decay must be above 0 and at most 1, but is {schedule.decay}")

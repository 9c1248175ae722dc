"""What a training must be like so that its steps can be taken again."""

from inspect import Parameter, signature

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fedrounds.doctor.stepping import TrainingState
from fedrounds.errors import InvalidInput


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step must be given a closure."""
    closure = signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def require_supported(training: TrainingState) -> None:
    """Raise where steps can't be repeated, or a state can't be put back.

    Raises:
        InvalidInput: says what isn't supported, and what to do.
    """
    # DistributedDataParallel and FullyShardedDataParallel both have it.
    if hasattr(training.model, "no_sync"):
        raise InvalidInput(
            "the doctor can't repeat a step in one of several data-parallel processes; train with "
            "one process, or without the doctor"
        )
    if isinstance(training.scheduler, ReduceLROnPlateau):
        raise InvalidInput(
            "ReduceLROnPlateau needs a metric: step it yourself after an epoch, and don't give it "
            "to the doctor"
        )
    if training.needs_closure and training.scaler is not None:
        raise InvalidInput(
            "an optimizer that computes the loss itself (L-BFGS) can't work with a GradScaler"
        )
    held = {id(parameter) for parameter in training.model.parameters()}
    groups = training.optimizer.param_groups
    num_foreign = sum(
        id(parameter) not in held for group in groups for parameter in group["params"]
    )
    if num_foreign:
        raise InvalidInput(
            f"the optimizer trains {num_foreign} parameters that the model doesn't hold; give the "
            "doctor one module that holds all of them, such as "
            f"{nn.ModuleList.__name__}([network, loss])"
        )

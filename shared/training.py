"""Training and evaluating a model. Pure PyTorch: knows no round, no server and no wire.

A model that stops being finite never leaves this module: `train_model` stops at the step at
which the loss, a gradient, a parameter or a buffer is first not finite and raises
`NonFiniteError`, which carries the numbers that show why and no weights.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD, Adam, AdamW, Optimizer

from shared.errors import FederationError, InvalidInput
from shared.types import Incident, IncidentKind

Batches = Iterable[tuple[Tensor, ...] | list[Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

_NUM_NORMS_KEPT = 5


class NonFiniteError(FederationError):
    """Training met a number that is not finite; the model is of no use and isn't returned.

    `incident` says what, in which step, and the numbers before it; its detail holds

    - `lr`; `batch` (from 1 in its epoch); `loss` of the step, itself perhaps nan or inf;
    - `grad_norm_0`, `grad_norm_1`, ...: L2 norms of the gradients before clipping, of the
      failing step, of the one before it, and so on.
    """

    status = "ABORTED"

    def __init__(self, incident: Incident) -> None:
        where = f" in {incident.tensor}" if incident.tensor else ""
        batch = incident.detail["batch"]
        super().__init__(
            f"{incident.kind}{where} at step {incident.step} (epoch {incident.epoch}, batch "
            f"{batch:.0f}, lr {incident.detail['lr']:g}, loss {incident.detail['loss']:g}); "
            f"lower lr or set clip_norm, and look for bad values in the data"
        )
        self.incident = incident


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """One optimizer step that went well. `step` counts from 1 over all epochs, `batch` in one.

    `grad_norm` is the gradient's global L2 norm before clipping.
    """

    step: int
    epoch: int
    batch: int
    batch_size: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Means over an epoch's examples, each taken just before the step that learned from it."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What was done. `num_examples` is the size of the data set, not multiplied by epochs."""

    num_steps: int
    num_examples: int
    epochs: tuple[EpochReport, ...]


class TrainingResult(NamedTuple):
    """The trained model and how it went: `state_dict, accuracy, report = train_model(...)`.

    `state_dict` holds detached copies on the CPU; `accuracy` is the last epoch's, in 0..1, as
    in EpochReport.
    """

    state_dict: dict[str, Tensor]
    accuracy: float
    report: TrainingReport


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in 0..1 and mean loss over `num_examples`; the loss of a broken model is nan."""

    accuracy: float
    loss: float
    num_examples: int


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], float, float, float], Optimizer]] = (
    MappingProxyType(
        {
            "sgd": lambda parameters, lr, momentum, weight_decay: SGD(
                parameters, lr=lr, momentum=momentum, weight_decay=weight_decay
            ),
            # Adam's first beta is its momentum: the same setting, with the same usual value.
            "adam": lambda parameters, lr, momentum, weight_decay: Adam(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            ),
            "adamw": lambda parameters, lr, momentum, weight_decay: AdamW(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            ),
        }
    )
)


def train_model(
    model: nn.Module,
    dataloader: Batches,
    epochs: int = 2,
    lr: float = 0.01,
    device: str | torch.device = "cpu",
    *,
    loss: Loss = F.cross_entropy,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
) -> TrainingResult:
    """Train `model` in place for `epochs` passes over `dataloader`.

    Batches are (inputs [batch, ...], targets int64 [batch, ...]); the model's outputs have the
    classes in dimension 1. On one machine, torch build and number of threads the result is the
    same bit for bit, given the same weights and the same batches; nothing here draws random
    numbers, but dropout in a model draws from the global generator: seed that.

    Args:
        model: moved to `device`, left there, in training mode.
        dataloader: gone through once an epoch; `shared.data.make_loader` gives one.
        epochs: number of passes, at least 1.
        lr: step size, above 0; the same throughout.
        device: a torch device.
        loss: (outputs, targets) to the mean loss of a batch.
        optimizer: a name in OPTIMIZERS; always starts without history.
        momentum: of SGD in 0..1 (1 excluded), beta_1 of Adam and AdamW.
        weight_decay: L2 penalty's coefficient (AdamW: decoupled), 0 or more.
        clip_norm: largest global L2 norm of a gradient, above 0, or None. Scaling the norm
            itself follows Pascanu et al. 2013, "On the difficulty of training recurrent neural
            networks", algorithm 1.
        on_step: told of each step after its checks; what it raises stops training and passes
            through, leaving the model in between.

    Returns:
        The trained state_dict, its accuracy while training, and the report.

    Raises:
        InvalidInput: a setting out of range, no batches, or outputs that don't fit the targets.
        NonFiniteError: the loss, a gradient, a parameter or a float buffer became non-finite.
    """
    _check_settings(
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        optimizer=optimizer,
    )
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descent = OPTIMIZERS[optimizer](parameters, lr, momentum, weight_decay)
    newest_norms: deque[float] = deque(maxlen=_NUM_NORMS_KEPT)
    epoch_reports: list[EpochReport] = []
    step = 0

    for epoch in range(1, epochs + 1):
        loss_sum = 0.0
        num_correct = torch.zeros((), dtype=torch.int64, device=device)
        num_examples = num_targets = 0
        for batch, (batch_inputs, batch_targets) in enumerate(dataloader, start=1):
            step += 1
            inputs, targets = batch_inputs.to(device), batch_targets.to(device)
            taken = _take_step(model, descent, inputs, targets, loss=loss, clip_norm=clip_norm)
            newest_norms.appendleft(taken.grad_norm)
            if taken.fault is not None:
                norms = {f"grad_norm_{age}": norm for age, norm in enumerate(newest_norms)}
                raise NonFiniteError(
                    Incident(
                        kind=taken.fault,
                        step=step,
                        epoch=epoch,
                        tensor=taken.bad_tensor,
                        detail={"lr": lr, "batch": batch, "loss": taken.loss, **norms},
                    )
                )
            loss_sum += taken.loss * len(targets)
            num_correct += _count_correct(taken.outputs, targets)
            num_examples += len(targets)
            num_targets += targets.numel()
            if on_step is not None:
                on_step(
                    StepProgress(
                        step=step,
                        epoch=epoch,
                        batch=batch,
                        batch_size=len(targets),
                        loss=taken.loss,
                        grad_norm=taken.grad_norm,
                    )
                )
        if num_examples == 0:
            raise InvalidInput(f"epoch {epoch}: the dataloader gave no examples; is it used up?")
        epoch_reports.append(
            EpochReport(loss=loss_sum / num_examples, accuracy=num_correct.item() / num_targets)
        )

    # Gradients and momenta go before the copy is made, so that it costs no new memory.
    descent.zero_grad()
    del descent
    return TrainingResult(
        state_dict={
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        },
        accuracy=epoch_reports[-1].accuracy,
        report=TrainingReport(
            num_steps=step, num_examples=num_examples, epochs=tuple(epoch_reports)
        ),
    )


def evaluate(
    model: nn.Module,
    dataloader: Batches,
    loss: Loss = F.cross_entropy,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Measure `model` on all batches, in evaluation mode; its own modes are restored after.

    Batches, outputs and `loss` are those of `train_model`. An output with a nan is never
    correct: argmax would call it class 0, and a model full of nan would score the share of
    that class.

    Raises:
        InvalidInput: no examples, or outputs that don't fit the targets.
    """
    losses: list[Tensor] = []
    sizes: list[int] = []
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    num_targets = 0
    model.to(device)
    with _evaluation_mode(model), torch.no_grad():
        for batch_inputs, batch_targets in dataloader:
            inputs, targets = batch_inputs.to(device), batch_targets.to(device)
            outputs = model(inputs)
            losses.append(loss(outputs, targets))
            sizes.append(len(targets))
            num_correct += _count_correct(outputs, targets)
            num_targets += targets.numel()
    num_examples = sum(sizes)
    if num_examples == 0:
        raise InvalidInput("there are no examples to evaluate the model on")
    # Read only now, so that the device never waits for this side.
    loss_sum = sum(
        value * size for value, size in zip(torch.stack(losses).tolist(), sizes, strict=True)
    )
    return Evaluation(
        accuracy=num_correct.item() / num_targets,
        loss=loss_sum / num_examples,
        num_examples=num_examples,
    )


@dataclass(frozen=True)
class _Step:
    """One optimizer step, or why it failed; `bad_tensor` is a key of the state_dict."""

    outputs: Tensor
    loss: float
    grad_norm: float
    fault: IncidentKind | None = None
    bad_tensor: str | None = None


def _take_step(
    model: nn.Module,
    descent: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss,
    clip_norm: float | None,
) -> _Step:
    descent.zero_grad()
    outputs = model(inputs)
    batch_loss = loss(outputs, targets)
    batch_loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # One wait for the device: once the norm is there, the loss is.
    grad_norm = float(get_total_norm(gradients.values()))
    bad_gradient = None
    if not math.isfinite(grad_norm):
        bad_gradient = _first_non_finite(gradients)
        if bad_gradient is None:
            grad_norm = _norm_without_overflow(gradients.values())
    taken = _Step(outputs.detach(), batch_loss.item(), grad_norm)
    if not math.isfinite(taken.loss):
        return replace(taken, fault=IncidentKind.NON_FINITE_LOSS)
    if bad_gradient is not None:
        return replace(taken, fault=IncidentKind.NON_FINITE_GRADIENT, bad_tensor=bad_gradient)
    if clip_norm is not None and grad_norm > clip_norm:
        for gradient in gradients.values():
            gradient.mul_(clip_norm / grad_norm)
    descent.step()
    state = model.state_dict()
    numbers = [tensor for tensor in state.values() if _has_fractions(tensor)]
    # The norm is a screen six times cheaper than looking at each entry; when it overflows, look.
    if not math.isfinite(get_total_norm(numbers)):
        bad_entry = _first_non_finite(state)
        if bad_entry is not None:
            return replace(taken, fault=IncidentKind.NON_FINITE_PARAMETER, bad_tensor=bad_entry)
    return taken


def _first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if _has_fractions(tensor) and not torch.isfinite(tensor).all():
            return name
    return None


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _norm_without_overflow(tensors: Iterable[Tensor]) -> float:
    """Return the L2 norm of finite tensors whose squares don't fit their own type."""
    filled = [tensor.detach().abs().cpu().double() for tensor in tensors if tensor.numel() > 0]
    largest = max(float(tensor.max()) for tensor in filled)
    return largest * math.hypot(*(float((tensor / largest).norm()) for tensor in filled))


def _count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.ndim < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        raise InvalidInput(
            f"outputs {tuple(outputs.shape)} don't fit targets {tuple(targets.shape)}: outputs "
            f"must have the classes in dimension 1, targets be class numbers without it"
        )
    return ((outputs.argmax(dim=1) == targets) & ~outputs.isnan().any(dim=1)).sum()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _check_settings(
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    clip_norm: float | None,
    optimizer: str,
) -> None:
    # Written as 'not in range' so that nan, which is in no range, is refused too.
    if epochs < 1:
        raise InvalidInput(f"epochs must be at least 1, but is {epochs}")
    if not 0 < lr < math.inf:
        raise InvalidInput(f"lr must be a positive number, but is {lr}")
    if not 0 <= momentum < 1:
        raise InvalidInput(f"momentum must be from 0 to below 1, but is {momentum}")
    if not 0 <= weight_decay < math.inf:
        raise InvalidInput(f"weight_decay must be 0 or a positive number, but is {weight_decay}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise InvalidInput(f"clip_norm must be a positive number or None, but is {clip_norm}")
    if optimizer not in OPTIMIZERS:
        raise InvalidInput(
            f"there is no optimizer {optimizer!r}; there are: {', '.join(OPTIMIZERS)}"
        )

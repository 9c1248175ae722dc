"""Training a model. Pure PyTorch: knows no round, no server and no wire.

A model that stops being finite never leaves this module: `train_model` stops at the step at
which the loss, a gradient, a parameter or a buffer is first not finite and raises
`NonFiniteError`, which carries the numbers that show why and no weights.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from shared.errors import FederationError, InvalidInput
from shared.evaluation import Batches, Loss, count_correct
from shared.optimizers import make_optimizer, make_scheduler
from shared.types import Incident, IncidentKind, Schedule
from shared.weights import first_non_finite

_NUM_NORMS_KEPT = 5
_CONSTANT = Schedule()


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

    `grad_norm` is the gradient's global L2 norm before clipping, `lr` the step size. Where it was
    asked for, `largest_gradient` is the largest absolute value in any gradient before clipping.
    """

    step: int
    epoch: int
    batch: int
    batch_size: int
    loss: float
    grad_norm: float
    lr: float
    largest_gradient: float | None = None


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
    schedule: Schedule = _CONSTANT,
    on_step: Callable[[StepProgress], None] | None = None,
    gradient_every: int = 0,
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
        lr: step size, above 0, before the schedule.
        device: a torch device.
        loss: (outputs, targets) to the mean loss of a batch.
        optimizer: a name in OPTIMIZERS; always starts without history.
        momentum: of SGD in 0..1 (1 excluded), beta_1 of Adam and AdamW.
        weight_decay: L2 penalty's coefficient (AdamW: decoupled), 0 or more.
        clip_norm: largest global L2 norm of a gradient, above 0, or None. Scaling the norm
            itself follows Pascanu et al. 2013, "On the difficulty of training recurrent neural
            networks", algorithm 1.
        schedule: how the step size changes; one that does needs a dataloader with a length.
        on_step: told of each step after its checks; what it raises stops training and passes
            through, leaving the model in between.
        gradient_every: every so many steps on_step also hears of the largest gradient; 0: never.

    Returns:
        The trained state_dict, its accuracy while training, and the report.

    Raises:
        InvalidInput: a setting out of range, no batches, or outputs that don't fit the targets.
        NonFiniteError: the loss, a gradient, a parameter or a float buffer became non-finite.
    """
    if epochs < 1:
        raise InvalidInput(f"epochs must be at least 1, but is {epochs}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise InvalidInput(f"clip_norm must be a positive number or None, but is {clip_norm}")
    model.to(device).train()
    trained = _Trained(model, loss=loss, clip_norm=clip_norm)
    descent = make_optimizer(
        optimizer, trained.learning, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    steps_per_epoch = len(dataloader) if isinstance(dataloader, Sized) else None
    scheduler = make_scheduler(descent, schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
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
            rate = descent.param_groups[0]["lr"]
            is_measured = gradient_every > 0 and step % gradient_every == 0
            taken = _take_step(trained, descent, inputs, targets, is_measured=is_measured)
            newest_norms.appendleft(taken.grad_norm)
            if taken.fault is not None:
                norms = {f"grad_norm_{age}": norm for age, norm in enumerate(newest_norms)}
                raise NonFiniteError(
                    Incident(
                        kind=taken.fault,
                        step=step,
                        epoch=epoch,
                        tensor=taken.bad_tensor,
                        detail={"lr": rate, "batch": batch, "loss": taken.loss, **norms},
                    )
                )
            if scheduler is not None:
                scheduler.step()
            loss_sum += taken.loss * len(targets)
            num_correct += count_correct(taken.outputs, targets)
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
                        lr=rate,
                        largest_gradient=taken.largest_gradient,
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


class _Trained:
    """A model under training, its loss, and its parameters listed once instead of every step."""

    def __init__(self, model: nn.Module, *, loss: Loss, clip_norm: float | None) -> None:
        self.model = model
        self.loss = loss
        self.clip_norm = clip_norm
        self.parameters = dict(model.named_parameters())
        self.learning = [one for one in self.parameters.values() if one.requires_grad]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the newest backward pass left."""
        return [one.grad for one in self.learning if one.grad is not None]

    def first_bad_gradient(self) -> str | None:
        """Return the name of the first parameter whose gradient isn't finite."""
        return first_non_finite(
            {name: one.grad for name, one in self.parameters.items() if one.grad is not None}
        )

    def first_bad_entry(self) -> str | None:
        """Return the name of the first entry of the state_dict that isn't finite."""
        # Buffers are listed anew: a module may put another tensor in the place of one.
        entries = (*self.parameters.values(), *self.model.buffers())
        # The norm is a screen six times cheaper than looking at each entry: where it isn't
        # finite, a number is bad or the norm itself overflows, and then we look.
        if math.isfinite(get_total_norm(one for one in entries if one.is_floating_point())):
            return None
        return first_non_finite(self.model.state_dict())


@dataclass(frozen=True)
class _Step:
    """One optimizer step, or why it failed; `bad_tensor` is a key of the state_dict."""

    outputs: Tensor
    loss: float
    grad_norm: float
    largest_gradient: float | None = None
    fault: IncidentKind | None = None
    bad_tensor: str | None = None


def _take_step(
    trained: _Trained, descent: Optimizer, inputs: Tensor, targets: Tensor, *, is_measured: bool
) -> _Step:
    descent.zero_grad()
    outputs = trained.model(inputs)
    batch_loss = trained.loss(outputs, targets)
    batch_loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradients = trained.gradients()
    # One wait for the device: once the norm is there, the loss is.
    grad_norm = float(get_total_norm(gradients))
    bad_gradient = None
    if not math.isfinite(grad_norm):
        bad_gradient = trained.first_bad_gradient()
        if bad_gradient is None:
            grad_norm = _norm_without_overflow(gradients)
    largest = _largest(gradients) if is_measured else None
    taken = _Step(outputs.detach(), batch_loss.item(), grad_norm, largest)
    if not math.isfinite(taken.loss):
        return replace(taken, fault=IncidentKind.NON_FINITE_LOSS)
    if bad_gradient is not None:
        return replace(taken, fault=IncidentKind.NON_FINITE_GRADIENT, bad_tensor=bad_gradient)
    if trained.clip_norm is not None and grad_norm > trained.clip_norm:
        for gradient in gradients:
            gradient.mul_(trained.clip_norm / grad_norm)
    descent.step()
    bad_entry = trained.first_bad_entry()
    if bad_entry is not None:
        return replace(taken, fault=IncidentKind.NON_FINITE_PARAMETER, bad_tensor=bad_entry)
    return taken


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(float(one.abs().max()) for one in tensors if one.numel() > 0)


def _norm_without_overflow(tensors: Iterable[Tensor]) -> float:
    """Return the L2 norm of finite tensors whose squares don't fit their own type."""
    filled = [tensor.detach().abs().cpu().double() for tensor in tensors if tensor.numel() > 0]
    largest = _largest(filled)
    return largest * math.hypot(*(float((tensor / largest).norm()) for tensor in filled))

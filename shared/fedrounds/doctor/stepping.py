"""One training step, under whatever treatment is in force: the same code live and in a replay."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode

from fedrounds.diagnosis.values import Oddity
from fedrounds.doctor.batches import (
    IGNORED_LABEL,
    Batch,
    are_out_of_range,
    batch_size,
    inputs_of,
    labels_of,
    map_tensors,
    rows_of,
    take,
)
from fedrounds.doctor.constants import make_stable
from fedrounds.doctor.guarded import guarding
from fedrounds.doctor.outputs import answers_of, loss_and_outputs

ComputeLoss = Callable[[nn.Module, Batch], Any]
"""(model, batch) to the loss, to (loss, outputs), to a mapping with "loss" or an object with it."""

STEP_ERRORS = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)
"""What a step that can't be taken raises, PyTorch's own and that of a model's checks."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What is done otherwise than the training says; the default is nothing.

    `rate_factor` multiplies the learning rate, which is at most `max_rate` then; over
    `warmup_steps` steps from `warmup_from` on it grows evenly to that. `clip_norm` is the largest
    global L2 norm of a gradient, beside the training's own. Samples with one of the oddities in
    `drops` are left out; an input is an outlier here if its absolute value is above `max_input`.
    With `sanitises`, such inputs are put right instead. Batches of fewer than `min_batch_size`
    samples, and the steps in `skips`, are left out; so are single samples, each as
    (step, position), in `without`. With `guards` the loss is computed by fedrounds.doctor.guarded,
    with `widens` everything narrower is computed in float32. With `trusts_gradient` a step is made
    where its gradient is finite, though its loss isn't. With `stabilises` the optimizer's constants
    are those of fedrounds.doctor.constants where its own can't be stable.
    """

    rate_factor: float = 1.0
    max_rate: float = math.inf
    warmup_steps: int = 0
    warmup_from: int = 0
    clip_norm: float | None = None
    drops: frozenset[Oddity] = frozenset()
    sanitises: bool = False
    max_input: float = math.inf
    min_batch_size: int = 0
    skips: frozenset[int] = frozenset()
    without: frozenset[tuple[int, int]] = frozenset()
    guards: bool = False
    widens: bool = False
    trusts_gradient: bool = False
    stabilises: bool = False

    @property
    def keeps_settings(self) -> bool:
        """Whether the learning rate and the optimizer's constants are the training's own."""
        keeps_rate = self.rate_factor == 1 and self.max_rate == math.inf and self.warmup_steps == 0
        return keeps_rate and not self.stabilises

    @property
    def is_plain(self) -> bool:
        """Whether the loss is computed as it is written."""
        return not (self.guards or self.widens)

    def rate(self, lr: float, *, step: int) -> float:
        """Return the learning rate of a step, where the training's own is `lr`."""
        done = step - self.warmup_from
        factor = self.rate_factor
        if 0 <= done < self.warmup_steps:
            factor *= (done + 1) / (self.warmup_steps + 1)
        return min(lr * factor, self.max_rate)


UNTREATED = Overrides()
_CHANGED = ("lr", "momentum", "weight_decay")
NARROW = (torch.float16, torch.bfloat16)


class Averaged(Protocol):
    """A moving average of a model's weights, such as torch.optim.swa_utils.AveragedModel."""

    def update_parameters(self, model: nn.Module) -> object:
        """Take the model's weights into the average."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the average holds, not copied."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Hold what is given."""


@dataclass
class Window:
    """Whether gradients of batches before wait for the optimizer's step."""

    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What is trained, and how.

    `non_finite` buffers weren't finite before the first step; labels in `ignored` are passed over
    by the loss, though no class has their number. `averaged` is updated after each optimizer step;
    with `needs_closure` that step computes the loss itself.
    """

    model: nn.Module
    optimizer: Optimizer
    compute_loss: ComputeLoss
    scheduler: LRScheduler | None = None
    clip_norm: float | None = None
    num_classes: int | None = None
    learning: list[nn.Parameter] = field(default_factory=list)
    non_finite: frozenset[str] = frozenset()
    ignored: frozenset[int] = frozenset({IGNORED_LABEL})
    scaler: GradScaler | None = None
    averaged: Averaged | None = None
    window: Window = field(default_factory=Window)
    needs_closure: bool = False

    def loss_of(self, batch: Batch, treatment: Overrides) -> tuple[Tensor, Any]:
        """Return the loss of a batch, with its graph, and the outputs if there are any."""
        if treatment.is_plain:
            computed = self.compute_loss(self.model, batch)
        else:
            with treated(treatment, self.model):
                computed = self.compute_loss(self.model, batch)
        return loss_and_outputs(computed)


def backward(training: TrainingState, loss: Tensor) -> None:
    """Add the gradients of a loss, scaled where there is a scaler."""
    scaled = loss if training.scaler is None else training.scaler.scale(loss)
    scaled.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


class StepOutcome(NamedTuple):
    """How a step went; `is_taken` is False where nothing was left of the batch to learn from.

    `grad_norm` is the global L2 norm before clipping, None where it wasn't measured;
    `has_dead_weights` whether it was, there are gradients of weights (parameters of two or more
    dimensions) and all of them are exactly zero. `outputs` are the answers among what was
    `returned` beside the loss, `batch` what they answer, of `num_classes` classes where that is
    known. `error` is what forward, loss or backward raised.
    Where the loss isn't finite, or the gradient is known not to be, the optimizer's step was not
    made.
    """

    # Every step makes an outcome, and this costs a third of a frozen dataclass.
    loss: float = math.nan
    grad_norm: float | None = None
    lr: float = 0.0
    batch_size: int = 0
    outputs: Tensor | None = None
    returned: Any = None
    batch: Batch = None
    num_classes: int | None = None
    has_dead_weights: bool = False
    is_taken: bool = True
    error: Exception | None = None

    @property
    def labels(self) -> Tensor | None:
        """The batch's labels, None if it has none; hardly any step needs them."""
        return labels_of(self.batch, num_classes=self.num_classes)

    @property
    def is_finite(self) -> bool:
        """Whether it went well as far as loss and gradient tell."""
        if not self.is_taken:
            return True
        if self.error is not None or not math.isfinite(self.loss):
            return False
        return self.grad_norm is None or math.isfinite(self.grad_norm)

    @property
    def has_finite_gradient(self) -> bool:
        """Whether the gradient was measured and is finite."""
        return self.grad_norm is not None and math.isfinite(self.grad_norm)

    def without_tensors(self) -> "StepOutcome":
        """Return the numbers alone, which take no memory to speak of."""
        return self._replace(outputs=None, returned=None, batch=None)


@dataclass(kw_only=True)
class Attempt:
    """How far a step has come; changed by `take_step` on the way.

    With `is_computed` the gradients are there; with `is_stepped` the optimizer, with `is_ended` the
    schedule and the average have done their part, or left it out on purpose.
    """

    loss: Tensor | None = None
    outputs: Any = None
    is_computed: bool = False
    is_stepped: bool = False
    is_ended: bool = False


def take_step(
    training: TrainingState,
    batch: Batch,
    treatment: Overrides,
    *,
    step: int,
    updates: bool = True,
    is_measured: bool = True,
    attempt: Attempt | None = None,
) -> StepOutcome:
    """Take one step: forward, backward, clipping, the optimizer's step and the scheduler's.

    Without `updates` the gradients are kept for the next steps to add to, and nothing is updated.
    Unless `is_measured`, the gradient is examined only where it is clipped: a gradient that isn't
    finite is learned from then, and shows in the steps after it. `attempt` is updated on the way.
    """
    attempt = Attempt() if attempt is None else attempt
    lr = treatment.rate(float(training.optimizer.param_groups[0]["lr"]), step=step)
    kept = None if step in treatment.skips else prepared(batch, treatment, training, step=step)
    if not training.window.is_open:
        training.optimizer.zero_grad()
    if kept is None:
        _leave_out(training, treatment, step=step, updates=updates)
        attempt.is_stepped = attempt.is_ended = True
        return StepOutcome(lr=lr, is_taken=False)
    size = batch_size(kept)
    try:
        loss, outputs = training.loss_of(kept, treatment)
        backward(training, loss)
    except STEP_ERRORS as error:
        return StepOutcome(lr=lr, batch_size=size, error=error)
    attempt.loss, attempt.outputs, attempt.is_computed = loss.detach(), outputs, True
    grad_norm, has_dead_weights = None, False
    scaler = training.scaler
    if scaler is not None and not updates:
        # The scaler divides gradients once, when all of a window are there.
        is_measured = False
    if is_measured or (updates and _limit(training, treatment) is not None):
        if scaler is not None:
            scaler.unscale_(training.optimizer)
        loss_value, grad_norm, has_dead_weights = _measure(training, loss.detach().reshape(()))
        if scaler is not None and not math.isfinite(grad_norm):
            grad_norm = _unless_rescaled(
                scaler, grad_norm, is_loss_finite=math.isfinite(loss_value)
            )
    else:
        loss_value = loss.item()
    answers = answers_of(outputs, size)
    outcome = StepOutcome(
        loss=loss_value,
        grad_norm=grad_norm,
        lr=lr,
        batch_size=size,
        outputs=None if answers is None else answers.detach(),
        returned=_detached(outputs),
        batch=kept,
        num_classes=_num_classes(training, answers),
        has_dead_weights=has_dead_weights,
    )
    if outcome.is_finite or (treatment.trusts_gradient and outcome.has_finite_gradient):
        if updates:
            again = Again(training, kept, treatment, loss=loss.detach())
            descend(training, treatment, step=step, grad_norm=grad_norm, again=again)
        training.window.is_open = not updates
        attempt.is_stepped = True
        if updates:
            end_step(training)
        attempt.is_ended = True
    return outcome


def _leave_out(training: TrainingState, treatment: Overrides, *, step: int, updates: bool) -> None:
    """Pass over a batch; where it was the last of a window, learn from those before it."""
    if updates and training.window.is_open:
        descend(training, treatment, step=step)
        end_step(training)
    elif updates and training.scheduler is not None:
        training.scheduler.step()
    training.window.is_open = training.window.is_open and not updates


def _unless_rescaled(scaler: GradScaler, grad_norm: float, *, is_loss_finite: bool) -> float | None:
    """Return the norm of a gradient that isn't finite; None where the scaler deals with it.

    It leaves the step out and tries a smaller scale. With a scale of 1 or less it isn't the scale.
    """
    scale = scaler.get_scale()
    if is_loss_finite and scale > 1:
        return None
    # As before the gradients were divided: the step isn't made, and may be taken once more.
    scaler.update(scale)
    return grad_norm


def _detached(outputs: Any) -> Any:  # noqa: ANN401  # any structure
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return None if outputs is None else map_tensors(outputs, Tensor.detach)


def _num_classes(training: TrainingState, outputs: Tensor | None) -> int | None:
    """Return how many classes there are, as far as that is known."""
    is_given = training.num_classes is not None or outputs is None or outputs.ndim < 2
    return training.num_classes if is_given or outputs is None else outputs.shape[1]


class Again:
    """The closure of an optimizer that computes the loss several times in a step (L-BFGS).

    Its first call returns `loss`, if it is given: the loss that was computed before.
    """

    def __init__(
        self,
        training: TrainingState,
        batch: Batch,
        treatment: Overrides,
        *,
        loss: Tensor | None = None,
    ) -> None:
        self._training, self._batch, self._treatment = training, batch, treatment
        self._loss = loss

    def __call__(self) -> Tensor:
        """Compute gradients, clipped, and return the loss."""
        training, loss = self._training, self._loss
        if loss is None:
            training.optimizer.zero_grad()
            with torch.enable_grad():
                new_loss, _ = training.loss_of(self._batch, self._treatment)
                backward(training, new_loss)
            _clip(training, self._treatment)
            loss = new_loss.detach()
        self._loss = None
        return loss


def descend(
    training: TrainingState,
    treatment: Overrides,
    *,
    step: int,
    grad_norm: float | None = None,
    again: Again | None = None,
) -> None:
    """Clip the gradients that are there and take the optimizer's step.

    `grad_norm` is their norm, where it is known. `again` is for an optimizer that needs a closure.
    """
    _clip(training, treatment, grad_norm=grad_norm)
    if treatment.keeps_settings:
        optimizer_step(training, again)
        return
    groups = training.optimizer.param_groups
    before = [{key: group[key] for key in _CHANGED if key in group} for group in groups]
    for group in groups:
        group["lr"] = treatment.rate(group["lr"], step=step)
    if treatment.stabilises:
        make_stable(training.optimizer)
    try:
        optimizer_step(training, again)
    finally:
        for group, settings in zip(groups, before, strict=True):
            group.update(settings)


def optimizer_step(training: TrainingState, again: Callable[[], Tensor] | None) -> None:
    """Take the optimizer's step, through the scaler or with a closure where needed."""
    if training.scaler is not None:
        training.scaler.step(training.optimizer)
        training.scaler.update()
    elif again is not None and training.needs_closure:
        training.optimizer.step(again)  # type: ignore[arg-type]  # any number does
    else:
        training.optimizer.step()


def end_step(training: TrainingState) -> None:
    """Do what follows on an optimizer's step: the average, and the schedule."""
    if training.averaged is not None:
        training.averaged.update_parameters(training.model)
    if training.scheduler is not None:
        training.scheduler.step()


def _clip(training: TrainingState, treatment: Overrides, *, grad_norm: float | None = None) -> None:
    """Make the gradients no longer than they may be; `grad_norm` is their norm, if known."""
    limit = _limit(training, treatment)
    if limit is None:
        return
    gradients = [parameter.grad for parameter in training.learning if parameter.grad is not None]
    if training.scaler is not None and grad_norm is None:
        # Its own step leaves out what isn't finite; measured before, it is finite and divided.
        return
    # As torch's clip_grad_norm_ does it: the weights are the same bits as a plain loop's.
    is_usual = treatment.clip_norm is None and not any(grad.is_sparse for grad in gradients)
    if is_usual and (total := torch.nn.utils.get_total_norm(gradients)).isfinite():
        torch.nn.utils.clip_grads_with_norm_(training.learning, limit, total)
        return
    if grad_norm is None:
        norms = torch._foreach_norm(_entries(gradients))
        grad_norm = _total([float(norm) for norm in norms], gradients)
    if grad_norm > limit:
        for sparse in (grad for grad in gradients if grad.is_sparse):
            sparse.mul_(limit / grad_norm)
        dense = [grad for grad in gradients if not grad.is_sparse]
        if dense:
            torch._foreach_mul_(dense, limit / grad_norm)


def _entries(gradients: list[Tensor]) -> list[Tensor]:
    """Return the numbers of each gradient; of a sparse gradient those that aren't zero."""
    return [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients]


def _limit(training: TrainingState, treatment: Overrides) -> float | None:
    """Return the largest norm that a gradient may have, None if it may have any."""
    if training.clip_norm is None or treatment.clip_norm is None:
        return training.clip_norm if treatment.clip_norm is None else treatment.clip_norm
    return min(training.clip_norm, treatment.clip_norm)


def _measure(training: TrainingState, loss: Tensor) -> tuple[float, float, bool]:
    """Return the loss, the gradient's norm, and whether there are weights' gradients, all zero."""
    learned = [parameter for parameter in training.learning if parameter.grad is not None]
    gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
    value, norms = _numbers(loss, gradients)
    weights = [norm for parameter, norm in zip(learned, norms, strict=True) if parameter.ndim > 1]
    return value, _total(norms, gradients), bool(weights) and not any(weights)


def _numbers(loss: Tensor, gradients: list[Tensor]) -> tuple[float, list[float]]:
    """Return the loss and each gradient's L2 norm with one wait for the device."""
    if not gradients:
        return loss.item(), []
    norms = torch._foreach_norm(_entries(gradients))
    if all(norm.dtype == loss.dtype and norm.device == loss.device for norm in norms):
        *values, last = torch.stack([*norms, loss]).tolist()
        return last, values
    return loss.item(), [norm.item() for norm in norms]


def _total(norms: list[float], gradients: list[Tensor]) -> float:
    """Return the norm of all, also where the squares don't fit the gradients' own type."""
    total = math.hypot(*norms)
    if math.isfinite(total) or not all(bool(grad.isfinite().all()) for grad in _entries(gradients)):
        return total if not math.isnan(total) else math.nan
    return math.hypot(*(float(_wide(grad).norm()) for grad in _entries(gradients)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@contextmanager
def treated(treatment: Overrides, model: nn.Module) -> Iterator[None]:
    """Compute a model's losses and their gradients as a treatment says."""
    with ExitStack() as stack:
        if treatment.guards:
            stack.enter_context(guarding(model))
        if treatment.widens:
            stack.enter_context(_Widened())
        yield


class _Widened(TorchFunctionMode):
    """No autocast, and no conversion to a type of 16 bits."""

    def __torch_function__(  # torch's own signature
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever the function gives
        named = dict(kwargs or {})
        if func in (torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(torch.float32 if arg in NARROW else arg for arg in args)
        if named.get("dtype") in NARROW:
            named["dtype"] = torch.float32
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return func(*args, **named)


def prepared(
    batch: Batch, treatment: Overrides, training: TrainingState, *, step: int
) -> Batch | None:
    """Return what a treatment leaves of a step's batch, None where nothing is left of it."""
    if left_out := {position for number, position in treatment.without if number == step}:
        kept = [position for position in range(batch_size(batch)) if position not in left_out]
        if not kept:
            return None
        batch = take(batch, kept)
    if treatment.widens:
        batch = map_tensors(batch, lambda leaf: leaf.float() if leaf.dtype in NARROW else leaf)
    if treatment.sanitises:
        batch = map_tensors(batch, lambda leaf: sanitised(leaf, treatment.max_input))
    if treatment.drops:
        odd = odd_samples(batch, treatment, training)
        if bool(odd.all()):
            return None
        if bool(odd.any()):
            batch = take(batch, (~odd).nonzero().flatten().tolist())
    is_enough = treatment.min_batch_size == 0 or batch_size(batch) >= treatment.min_batch_size
    return batch if is_enough else None


def sanitised(tensor: Tensor, max_input: float) -> Tensor:
    """Return floats with zero for what isn't finite, and nothing larger than `max_input`."""
    if not tensor.is_floating_point():
        return tensor
    clean = torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))
    return clean if math.isinf(max_input) else clean.clamp(-max_input, max_input)


def odd_samples(batch: Batch, treatment: Overrides, training: TrainingState) -> Tensor:
    """Return for each sample whether a treatment leaves it out, bool [n]."""
    odd = torch.zeros(batch_size(batch), dtype=torch.bool)
    for inputs in inputs_of(batch):
        flat = rows_of(inputs.detach())
        if flat.shape[1] == 0:
            continue
        if Oddity.NAN in treatment.drops:
            odd |= flat.isnan().any(dim=1).cpu()
        if Oddity.INFINITY in treatment.drops:
            odd |= flat.isinf().any(dim=1).cpu()
        if Oddity.OUTLIER in treatment.drops:
            largest = flat.nan_to_num(nan=0.0).abs().amax(dim=1)
            odd |= (largest > treatment.max_input).cpu()
        if Oddity.EMPTY in treatment.drops:
            odd |= (flat == 0).all(dim=1).cpu()
    num_classes = training.num_classes
    labels = labels_of(batch, num_classes=num_classes)
    if Oddity.LABEL_OUT_OF_RANGE in treatment.drops and labels is not None and num_classes:
        wrong = rows_of(are_out_of_range(labels, num_classes, training.ignored))
        odd |= wrong.any(dim=1).cpu()
    return odd

"""Training a model. Pure PyTorch: this module knows no round, no server and no wire.

A model that isn't finite never leaves this module. The doctor (fedrounds.doctor) takes every step.
If it is armed, it finds the cause of a failure, cures it and goes on. If not, it stops at the first
step whose loss, gradient or parameter isn't finite, and at most eight steps after a buffer isn't.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Diagnosis, Symptom
from fedrounds.doctor import UNTREATED, Doctor, DoctorSettings, Overrides, StepReport
from fedrounds.doctor.batches import Batch, batch_size
from fedrounds.errors import InvalidInput
from fedrounds.nested import to_device
from fedrounds.training.corrections import Correction, correct_gradients
from fedrounds.training.evaluation import Batches
from fedrounds.training.objective import (
    Loss,
    TrainingStep,
    compute_loss_of,
    count_correct,
    share_of,
)
from fedrounds.training.optimizers import make_optimizer, make_scheduler
from fedrounds.types import Incident, IncidentKind, Schedule

_CONSTANT = Schedule()
DISARMED = DoctorSettings(is_armed=False)


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """One optimizer step that went well.

    `step` counts from 1 over all epochs, `batch` from 1 in its epoch. `grad_norm` is the gradient's
    global L2 norm before clipping, None if it wasn't measured (an armed doctor measures now and
    then). `lr` is the step size. `largest_gradient` is the largest absolute value in any gradient
    before clipping, None if it wasn't measured (see Callbacks.gradient_every).
    """

    step: int
    epoch: int
    batch: int
    batch_size: int
    loss: float
    grad_norm: float | None
    lr: float
    largest_gradient: float | None = None


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that a training calls as it goes on.

    Args:
        on_step: called with each step, after its checks. If it raises, training stops there and the
            exception passes through; the model stays as that step left it.
        gradient_every: every so many steps on_step also gets the largest gradient; 0: never.
        is_enough: called after each step with its number from 1; True ends training.
        on_replay: called for each step that the doctor takes again.
        on_diagnosis: called with each diagnosis as soon as the doctor has made it.
    """

    on_step: Callable[[StepProgress], None] = lambda _: None
    gradient_every: int = 0
    is_enough: Callable[[int], bool] = lambda _: False
    on_replay: Callable[[], None] = lambda: None
    on_diagnosis: Callable[[Diagnosis], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class DoctorContext:
    """What the doctor knows of a training beside its model and its data.

    Args:
        num_classes: targets go from 0 to below it; the doctor finds other labels before they do
            harm. None: unknown.
        is_initial: the weights are newly initialised; False: they were trained before.
        fresh_state: returns usual initial weights by name, for the doctor's experiments.
        treatment: the remedies in force at the start, from an earlier training.
    """

    num_classes: int | None = None
    is_initial: bool = True
    fresh_state: Callable[[], Mapping[str, Tensor]] | None = None
    treatment: Overrides = UNTREATED


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Means over an epoch's examples, each taken just before the step that learned from it.

    `accuracy` is None where it means nothing (see fedrounds.training.objective.count_correct). If
    every batch was left out, it is None and the loss is nan.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How a training went.

    `num_examples` counts each example once, whatever the number of epochs. `diagnoses` are of the
    failures that were cured, `treatment` holds the remedies in force at the end.
    `has_dropped_samples`: a remedy left some samples out.
    """

    num_steps: int
    num_examples: int
    epochs: tuple[EpochReport, ...]
    diagnoses: tuple[Diagnosis, ...] = ()
    treatment: Overrides = UNTREATED
    has_dropped_samples: bool = False


class TrainingResult(NamedTuple):
    """The trained model and how it went: `state_dict, accuracy, report = train_model(...)`.

    `state_dict` holds detached copies on the CPU (see `keeps_model`); `accuracy` is the last
    epoch's, in 0..1 or None, as in EpochReport.
    """

    state_dict: dict[str, Tensor]
    accuracy: float | None
    report: TrainingReport


_NO_CALLBACKS = Callbacks()
_NO_CONTEXT = DoctorContext()


def train_model(
    model: nn.Module,
    dataloader: Batches,
    epochs: int = 2,
    lr: float = 0.01,
    device: str | torch.device = "cpu",
    *,
    loss: Loss | None = F.cross_entropy,
    training_step: TrainingStep | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    schedule: Schedule = _CONSTANT,
    correction: Correction | None = None,
    callbacks: Callbacks = _NO_CALLBACKS,
    doctor: DoctorSettings = DISARMED,
    doctor_context: DoctorContext = _NO_CONTEXT,
    keeps_model: bool = True,
) -> TrainingResult:
    """Train `model` in place for `epochs` passes over `dataloader`.

    With `loss` batches are (inputs, targets), each of any structure (see fedrounds.nested); with
    `training_step` a batch may be anything. The examples are in dimension 0 of its tensors, or are
    the items of lists. Accuracy is counted for targets that are classes, with `training_step` only
    if the doctor's context knows how many (see fedrounds.training.objective).

    On one machine, torch build and number of threads, the same weights and the same batches give
    the same result bit for bit. This function draws no random numbers; dropout in a model draws
    from the global generator: seed that.

    Args:
        model: moved to `device` and left there, in training mode.
        dataloader: iterated once an epoch; `fedrounds.data.make_loader` makes it. If it has
            `newest_indices`, diagnoses name examples by them.
        epochs: number of passes, at least 1.
        lr: step size, above 0, before the schedule.
        device: a torch device.
        loss: (outputs, targets) to the mean loss of a batch.
        training_step: (model, batch) to the mean loss of a batch, or to (loss, outputs), or to a
            dictionary or an object with `loss`; it replaces `loss`. The doctor may call it again
            for the same batch, so it must depend on its arguments and torch's generators alone.
        optimizer: a name in OPTIMIZERS; it always starts without history.
        momentum: of SGD, in 0..1 (1 excluded); beta_1 of Adam and AdamW.
        weight_decay: coefficient of the L2 penalty (AdamW: decoupled), 0 or more.
        clip_norm: largest global L2 norm of a gradient, above 0, or None. Scaling the norm
            itself follows Pascanu et al. 2013, "On the difficulty of training recurrent neural
            networks", algorithm 1.
        schedule: how the step size changes; any but "constant" needs a dataloader with a length.
        correction: what a client algorithm adds to gradients.
        callbacks: functions that this training calls as it goes on.
        doctor: what may be done when training goes wrong; by default training stops.
        doctor_context: what the doctor knows beside the model and its data.
        keeps_model: whether the caller uses `model` afterwards; if not, the result may share its
            tensors.

    Returns:
        The trained state_dict, its accuracy while training, and the report.

    Raises:
        InvalidInput: a setting out of range, no batches, or a batch or loss of another form.
        TrainingHalted: training went wrong, and may not or can't be cured.
    """
    if epochs < 1:
        raise InvalidInput(f"epochs must be at least 1, but is {epochs}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise InvalidInput(f"clip_norm must be a positive number or None, but is {clip_norm}")
    model.to(device).train()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descent = make_optimizer(
        optimizer, trainable, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    steps_per_epoch = len(dataloader) if isinstance(dataloader, Sized) else None
    if correction is not None:
        correct_gradients(descent, model, correction)
    stepper = Doctor(
        model,
        descent,
        compute_loss_of(loss, training_step),
        scheduler=make_scheduler(descent, schedule, steps_per_epoch=steps_per_epoch, epochs=epochs),
        settings=doctor,
        clip_norm=clip_norm,
        num_classes=doctor_context.num_classes,
        is_initial=doctor_context.is_initial,
        fresh_state=doctor_context.fresh_state,
        treatment=doctor_context.treatment,
        on_replay=callbacks.on_replay,
        on_diagnosis=callbacks.on_diagnosis,
    )

    def class_targets(taken: StepReport, batch: Batch) -> Tensor | None:
        """Return what may be classes of the samples that were learned from."""
        if training_step is not None:
            return None if doctor_context.num_classes is None else taken.labels
        return taken.targets if isinstance(batch[1], Tensor) else None

    epoch_reports: list[EpochReport] = []
    step = num_examples = num_kept = 0
    is_over = False
    for epoch in range(1, epochs + 1):
        means = _EpochMeans(device)
        for batch_number, given in enumerate(dataloader, start=1):
            batch = to_device(given, device)
            taken = stepper.step(
                batch,
                indices=getattr(dataloader, "newest_indices", None),
                epoch=epoch,
            )
            step += 1
            means.add(taken, num_given=batch_size(batch), targets=class_targets(taken, batch))
            measures_gradient = (
                callbacks.gradient_every > 0 and step % callbacks.gradient_every == 0
            )
            callbacks.on_step(
                StepProgress(
                    step=step,
                    epoch=epoch,
                    batch=batch_number,
                    batch_size=taken.batch_size,
                    loss=taken.loss,
                    grad_norm=taken.grad_norm,
                    lr=taken.lr,
                    largest_gradient=(
                        _largest_gradient(trainable, taken, clip_norm)
                        if measures_gradient
                        else None
                    ),
                )
            )
            if is_over := callbacks.is_enough(step):
                break
        if means.num_given == 0:
            raise InvalidInput(f"epoch {epoch}: the dataloader gave no examples; is it used up?")
        if means.num_given >= num_examples:
            num_examples, num_kept = means.num_given, means.num_examples
        epoch_reports.append(means.report())
        if is_over:
            break
    stepper.finish()
    report = TrainingReport(
        num_steps=step,
        num_examples=num_examples,
        epochs=tuple(epoch_reports),
        diagnoses=tuple(stepper.diagnoses),
        treatment=stepper.treatment,
        has_dropped_samples=num_kept < num_examples,
    )
    # Free gradients, momenta and the doctor's copies before the last copy is made.
    descent.zero_grad()
    del descent, stepper
    return TrainingResult(
        state_dict={
            name: tensor.detach().to(
                "cpu", dtypes[name], copy=keeps_model, memory_format=torch.contiguous_format
            )
            for name, tensor in model.state_dict().items()
        },
        accuracy=epoch_reports[-1].accuracy,
        report=report,
    )


def incident_of(diagnosis: Diagnosis) -> Incident:
    """Return the incident for a diagnosis.

    For a diagnosis of a disarmed doctor, the symptom decides the kind, and the detail holds

    - `lr`; `batch` (from 1 in its epoch); `loss` of the step, itself perhaps nan or inf;
    - `grad_norm_0`, `grad_norm_1`, ...: L2 norms of the gradients before clipping, of the
      failing step, of the step before it, and so on.
    """
    if diagnosis.experiments:
        return Incident(
            kind=IncidentKind.TRAINING_DIAGNOSED,
            step=diagnosis.step,
            epoch=diagnosis.epoch,
            tensor=diagnosis.origin.tensor or None,
            diagnosis=diagnosis,
        )
    newest_first = diagnosis.trend[::-1]
    norms = {f"grad_norm_{age}": point.grad_norm for age, point in enumerate(newest_first)}
    return Incident(
        kind=_KINDS.get(diagnosis.symptom, IncidentKind.NON_FINITE_PARAMETER),
        step=diagnosis.step,
        epoch=diagnosis.epoch,
        tensor=diagnosis.origin.tensor or None,
        detail={
            "lr": diagnosis.lr,
            "batch": diagnosis.batch,
            "loss": newest_first[0].loss,
            **norms,
        },
    )


_KINDS: Mapping[Symptom, IncidentKind] = {
    Symptom.NON_FINITE_FORWARD: IncidentKind.NON_FINITE_LOSS,
    Symptom.NON_FINITE_LOSS: IncidentKind.NON_FINITE_LOSS,
    Symptom.NON_FINITE_GRADIENT: IncidentKind.NON_FINITE_GRADIENT,
}


class _EpochMeans:
    """Sums and means over an epoch's examples; examples that a remedy left out don't count."""

    def __init__(self, device: str | torch.device) -> None:
        self.num_given = self.num_examples = 0
        self._loss_sum = 0.0
        self._num_correct, self._num_targets = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)
        )

    def add(self, taken: StepReport, *, num_given: int, targets: Tensor | None) -> None:
        self.num_given += num_given
        if taken.batch_size == 0:
            return
        self.num_examples += taken.batch_size
        self._loss_sum += taken.loss * taken.batch_size
        if (counts := count_correct(taken.outputs, targets)) is not None:
            self._num_correct += counts[0]
            self._num_targets += counts[1]

    def report(self) -> EpochReport:
        if self.num_examples == 0:
            return EpochReport(loss=math.nan, accuracy=None)
        return EpochReport(
            loss=self._loss_sum / self.num_examples,
            accuracy=share_of(self._num_correct, self._num_targets),
        )


def _largest_gradient(
    trainable: Iterable[nn.Parameter], taken: StepReport, clip_norm: float | None
) -> float:
    """Return the largest absolute value in any gradient, before clipping."""
    gradients = [
        parameter.grad
        for parameter in trainable
        if parameter.grad is not None and parameter.grad.numel() > 0
    ]
    scale = 1.0
    if clip_norm is not None and taken.grad_norm is not None:
        scale = max(1.0, taken.grad_norm / clip_norm)
    return scale * max((float(gradient.abs().max()) for gradient in gradients), default=0.0)

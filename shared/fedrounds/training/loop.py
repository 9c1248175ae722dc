"""Training a model. Pure PyTorch: knows no round, no server and no wire.

A model that stops being finite never leaves this module. Every step is the doctor's
(fedrounds.doctor): armed, it finds out why a training goes wrong, cures it and goes on; disarmed,
it stops at the step at which the loss, a gradient or a parameter is first not finite, and at most
eight steps after a buffer is.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Diagnosis, Symptom
from fedrounds.doctor import UNTREATED, Doctor, DoctorSettings, StepReport, Treatment
from fedrounds.doctor.batches import Batch
from fedrounds.errors import InvalidInput
from fedrounds.training.corrections import Correction, correct_gradients
from fedrounds.training.evaluation import Batches, Loss, count_correct, main_output
from fedrounds.training.optimizers import make_optimizer, make_scheduler
from fedrounds.types import Incident, IncidentKind, Schedule

_CONSTANT = Schedule()
DISARMED = DoctorSettings(is_armed=False)


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """One optimizer step that went well. `step` counts from 1 over all epochs, `batch` in one.

    `grad_norm` is the gradient's global L2 norm before clipping, None where it wasn't measured (an
    armed doctor measures now and then); `lr` is the step size. Where it was asked for,
    `largest_gradient` is the largest absolute value in any gradient before clipping.
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
class EpochReport:
    """Means over an epoch's examples, each taken just before the step that learned from it."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What was done. `num_examples` is how many examples it saw, not multiplied by epochs.

    `diagnoses` are of what went wrong and was cured, `treatment` is what is in force at the end;
    `has_dropped_samples` whether it left any sample out.
    """

    num_steps: int
    num_examples: int
    epochs: tuple[EpochReport, ...]
    diagnoses: tuple[Diagnosis, ...] = ()
    treatment: Treatment = UNTREATED
    has_dropped_samples: bool = False


class TrainingResult(NamedTuple):
    """The trained model and how it went: `state_dict, accuracy, report = train_model(...)`.

    `state_dict` holds detached copies on the CPU (see `keeps_model`); `accuracy` is the last
    epoch's, in 0..1, as in EpochReport.
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
    correction: Correction | None = None,
    is_enough: Callable[[int], bool] = lambda _: False,
    on_step: Callable[[StepProgress], None] | None = None,
    gradient_every: int = 0,
    doctor: DoctorSettings = DISARMED,
    num_classes: int | None = None,
    is_initial: bool = True,
    fresh_state: Callable[[], Mapping[str, Tensor]] | None = None,
    treatment: Treatment = UNTREATED,
    on_replay: Callable[[], None] = lambda: None,
    on_diagnosis: Callable[[Diagnosis], None] = lambda _: None,
    keeps_model: bool = True,
) -> TrainingResult:
    """Train `model` in place for `epochs` passes over `dataloader`.

    Batches are (inputs [batch, ...], targets int64 [batch, ...]); the model's outputs, or the main
    one of them (see fedrounds.training.evaluation.main_output), have the classes in dimension 1.
    On one machine, torch build and number of threads the result is the
    same bit for bit, given the same weights and the same batches; nothing here draws random
    numbers, but dropout in a model draws from the global generator: seed that.

    Args:
        model: moved to `device`, left there, in training mode.
        dataloader: gone through once an epoch; `fedrounds.data.make_loader` gives one. Where it has
            `newest_indices`, a diagnosis names examples by these.
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
        correction: what is added to gradients.
        is_enough: asked after each step, by its number from 1; True ends training there.
        on_step: told of each step after its checks; what it raises stops training and passes
            through, leaving the model in between.
        gradient_every: every so many steps on_step also hears of the largest gradient; 0: never.
        doctor: what is done where training goes wrong; by default it stops there.
        num_classes: targets go from 0 to below it; a label that doesn't is found before it harms.
        is_initial: whether the weights are freshly initialised rather than trained before.
        fresh_state: gives usual initial weights by name, for the doctor's experiments.
        treatment: what is in force from the beginning, from a cure before.
        on_replay: told of each step that the doctor takes again.
        on_diagnosis: told of each diagnosis the moment it is there.
        keeps_model: whether `model` is used any more; if not, the result may be its own tensors.

    Returns:
        The trained state_dict, its accuracy while training, and the report.

    Raises:
        InvalidInput: a setting out of range, no batches, or outputs that don't fit the targets.
        TrainingHalted: training went wrong, and may not or can't be cured.
    """
    if epochs < 1:
        raise InvalidInput(f"epochs must be at least 1, but is {epochs}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise InvalidInput(f"clip_norm must be a positive number or None, but is {clip_norm}")
    model.to(device).train()
    dtypes = {name: one.dtype for name, one in model.state_dict().items()}
    learning = [one for one in model.parameters() if one.requires_grad]
    descent = make_optimizer(
        optimizer, learning, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    steps_per_epoch = len(dataloader) if isinstance(dataloader, Sized) else None
    if correction is not None:
        correct_gradients(descent, model, correction)
    at_work = Doctor(
        model,
        descent,
        _compute_loss(loss),
        scheduler=make_scheduler(descent, schedule, steps_per_epoch=steps_per_epoch, epochs=epochs),
        settings=doctor,
        clip_norm=clip_norm,
        num_classes=num_classes,
        is_initial=is_initial,
        fresh_state=fresh_state,
        treatment=treatment,
        on_replay=on_replay,
        on_diagnosis=on_diagnosis,
    )
    epoch_reports: list[EpochReport] = []
    step = num_examples = num_kept = 0
    is_over = False
    for epoch in range(1, epochs + 1):
        means = _EpochMeans(device)
        for batch, (inputs, targets) in enumerate(dataloader, start=1):
            taken = at_work.step(
                (inputs.to(device), targets.to(device)),
                indices=getattr(dataloader, "newest_indices", None),
                epoch=epoch,
            )
            step += 1
            means.add(taken, num_given=len(targets))
            if on_step is not None:
                is_measured = gradient_every > 0 and step % gradient_every == 0
                on_step(
                    StepProgress(
                        step=step,
                        epoch=epoch,
                        batch=batch,
                        batch_size=taken.batch_size,
                        loss=taken.loss,
                        grad_norm=taken.grad_norm,
                        lr=taken.lr,
                        largest_gradient=(
                            _largest_gradient(learning, taken, clip_norm) if is_measured else None
                        ),
                    )
                )
            if is_over := is_enough(step):
                break
        if means.num_given == 0:
            raise InvalidInput(f"epoch {epoch}: the dataloader gave no examples; is it used up?")
        if means.num_given >= num_examples:
            num_examples, num_kept = means.num_given, means.num_examples
        epoch_reports.append(means.report())
        if is_over:
            break
    at_work.finish()
    report = TrainingReport(
        num_steps=step,
        num_examples=num_examples,
        epochs=tuple(epoch_reports),
        diagnoses=tuple(at_work.diagnoses),
        treatment=at_work.treatment,
        has_dropped_samples=num_kept < num_examples,
    )
    # Gradients, momenta and the doctor's copies go before the last copy is made.
    descent.zero_grad()
    del descent, at_work
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
    """Return the incident that a diagnosis is.

    One that a disarmed doctor made is of a kind by its symptom; its detail holds

    - `lr`; `batch` (from 1 in its epoch); `loss` of the step, itself perhaps nan or inf;
    - `grad_norm_0`, `grad_norm_1`, ...: L2 norms of the gradients before clipping, of the
      failing step, of the one before it, and so on.
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
    norms = {f"grad_norm_{age}": one.grad_norm for age, one in enumerate(newest_first)}
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
    """Sums over an epoch's examples, and their means; what was left out doesn't count."""

    def __init__(self, device: str | torch.device) -> None:
        self.num_given = self.num_examples = 0
        self._num_targets = 0
        self._loss_sum = 0.0
        self._num_correct = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, taken: StepReport, *, num_given: int) -> None:
        self.num_given += num_given
        if taken.batch_size == 0:
            return
        assert taken.outputs is not None
        assert taken.targets is not None
        self.num_examples += taken.batch_size
        self._num_targets += taken.targets.numel()
        self._loss_sum += taken.loss * taken.batch_size
        self._num_correct += count_correct(taken.outputs, taken.targets)

    def report(self) -> EpochReport:
        if self.num_examples == 0:
            return EpochReport(loss=math.nan, accuracy=0.0)
        return EpochReport(
            loss=self._loss_sum / self.num_examples,
            accuracy=self._num_correct.item() / self._num_targets,
        )


def _compute_loss(loss: Loss) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    def compute(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        inputs, targets = batch
        outputs = model(inputs)
        return loss(outputs, targets), main_output(outputs)

    return compute


def _largest_gradient(
    learning: Iterable[nn.Parameter], taken: StepReport, clip_norm: float | None
) -> float:
    """Return the largest absolute value in any gradient before it was clipped."""
    gradients = [one.grad for one in learning if one.grad is not None and one.grad.numel() > 0]
    scale = 1.0
    if clip_norm is not None and taken.grad_norm is not None:
        scale = max(1.0, taken.grad_norm / clip_norm)
    return scale * max((float(one.abs().max()) for one in gradients), default=0.0)

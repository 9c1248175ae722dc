"""Checks of a client's data, first weights and first steps, before it joins a run.

Everything stays on this machine, so a check may name examples by number.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedrounds.diagnosis.values import Diagnosis, DoctorSettings, RemedyPolicy
from fedrounds.doctor import TrainingHalted
from fedrounds.doctor.anomalies import unusual_entries, usual_state
from fedrounds.doctor.batches import are_out_of_range
from fedrounds.doctor.history import Snapshot
from fedrounds.errors import FederationError
from fedrounds.outliers import OUTLIER_DEVIATIONS, OUTLIER_FACTOR, median_and_deviation
from fedrounds.plugins import in_one_line
from fedrounds.tasks.loading import batches_in_order, training_batches
from fedrounds.tasks.task import Examples, Task, count_examples
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import Callbacks, DoctorContext, StepProgress, train_model
from fedrounds.training.trial import try_training_step
from fedrounds.types import TrainingConfig

_CHUNK = 256
_USUAL_SHARE = 0.99
_MIN_ENTRIES = 16
"""An input with fewer numbers may rightly hold the same number everywhere."""
_NUM_LISTED = 5
_MAX_CLASSES_LISTED = 12
_NUM_COMPARED = 5


class Severity(StrEnum):
    """How serious the result of a check is."""

    OK = "ok"
    WARNING = "warning"
    """Worth a look; training works all the same."""
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: its subject, and its result in words."""

    severity: Severity
    subject: str
    result: str


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """How the first steps of a training went.

    `diagnosis` is the doctor's, `error` what the task's own code raised; both are None if all steps
    went well.
    """

    num_steps: int
    losses: tuple[float, ...]
    diagnosis: Diagnosis | None
    error: Exception | None = None


def inspect_data(examples: Examples, task: Task) -> list[Check]:
    """Check every example for NaN, infinity, outliers, blank inputs and labels out of range."""
    num_examples = count_examples(task, examples, loaded_by="load_train")
    if num_examples and not _are_pairs(task, examples):
        result = f"{num_examples}, not inspected: they aren't pairs of tensors"
        return [Check(severity=Severity.OK, subject="examples", result=result)]
    seen = _summarise(task, examples)
    if seen.num == 0:
        return [Check(severity=Severity.ERROR, subject="examples", result="none")]
    checks = [
        Check(
            severity=Severity.OK,
            subject="examples",
            result=f"{seen.num}, inputs {list(seen.input_shape)} {seen.input_dtype}{seen.extent}",
        )
    ]
    non_finite = Severity.ERROR if task.finite_inputs else Severity.WARNING
    outliers = _outliers(seen.largest)
    labels = None if seen.targets.is_floating_point() else seen.targets
    wrong = torch.zeros(seen.num, dtype=torch.bool)
    if labels is not None and task.num_classes is not None:
        wrong = are_out_of_range(labels, task.num_classes).reshape(seen.num, -1).any(1)
    for subject, is_hit, severity, if_none in (
        ("NaN", seen.num_nan > 0, non_finite, "none"),
        ("infinity", seen.num_inf > 0, non_finite, "none"),
        ("outliers", outliers, Severity.ERROR, "none"),
        ("blank inputs", seen.is_constant, Severity.WARNING, "none"),
        ("labels", wrong, Severity.ERROR, _labels_in_words(labels, task)),
    ):
        numbers = is_hit.nonzero().flatten().tolist()
        result = if_none if not numbers else _listed(numbers)
        if numbers and subject == "outliers":
            usual = seen.largest.median().item()
            result += f" (up to {seen.largest[is_hit].max().item():.4g}, usual {usual:.4g})"
        if numbers and subject == "blank inputs":
            result += " (all of its numbers are the same)"
        if numbers and subject == "labels":
            assert task.num_classes is not None
            result += f" (not from 0 to {task.num_classes - 1})"
        checks.append(
            Check(severity=severity if numbers else Severity.OK, subject=subject, result=result)
        )
    if labels is not None and labels.numel():
        checks.append(_histogram(labels[~wrong], task))
    return checks


def inspect_weights(model: nn.Module, *, is_initial: bool = True) -> Check:
    """Compare a model's initial or received weights with those that its modules draw."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    start = Snapshot(step=0, tensors=tensors, optimizer_state=[], groups=[], scheduler_state=None)
    unusual = unusual_entries(model, start, usual_state(model), is_initial=is_initial)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if not unusual:
        result = f"{num_weights}, of usual sizes"
        return Check(severity=Severity.OK, subject="weights", result=result)
    names = ", ".join(unusual[:_NUM_LISTED]) + (", ..." if len(unusual) > _NUM_LISTED else "")
    return Check(
        severity=Severity.ERROR,
        subject="weights",
        result=f"unlike what torch draws: {names} (10 times too large or small, or all the same)",
    )


def inspect_received_model(
    model: nn.Module, examples: Examples, task: Task, device: torch.device
) -> Check:
    """Evaluate a received model on a client's examples."""
    loader = batches_in_order(task, examples, batch_size=_CHUNK)
    evaluation = evaluate(
        model,
        loader,
        task.loss,
        device,
        training_step=task.training_step,
        num_classes=task.num_classes,
    )
    right = "" if evaluation.accuracy is None else f"{evaluation.accuracy:.2%} of this data right, "
    return Check(
        severity=Severity.OK if math.isfinite(evaluation.loss) else Severity.ERROR,
        subject="received model",
        result=f"{right}loss {evaluation.loss:.4g}",
    )


def inspect_trial_step(
    task: Task, examples: Examples, device: torch.device
) -> tuple[Check, Exception | None]:
    """Check whether a client's examples, model and loss fit each other, by one training step.

    A client takes the same trial step before it joins a run.

    Returns:
        The check, and the exception that the step raised, if any.
    """
    try:
        try_training_step(task, examples, device=device)
    except FederationError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        result = in_one_line(cause)
        return Check(severity=Severity.ERROR, subject="trial step", result=result), cause
    result = "forward pass, loss and backward pass work"
    return Check(severity=Severity.OK, subject="trial step", result=result), None


def take_first_steps(
    model: nn.Module,
    examples: Examples,
    task: Task,
    *,
    training: TrainingConfig,
    num_steps: int,
    device: torch.device,
    seed: int,
    memory_bytes: int,
    is_initial: bool = True,
) -> FirstSteps:
    """Train for some steps under the doctor, which reports what goes wrong and cures nothing.

    `is_initial`: the weights are initial, not received.
    """
    losses: list[float] = []

    def record_loss(step: StepProgress) -> None:
        losses.append(step.loss)

    diagnosis, failure = None, None
    try:
        train_model(
            model,
            _FirstBatches(
                training_batches(task, examples, batch_size=training.batch_size, seed=seed),
                num_steps,
            ),
            epochs=1,
            lr=training.lr,
            device=device,
            loss=task.loss,
            training_step=task.training_step,
            optimizer=training.optimizer,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            callbacks=Callbacks(on_step=record_loss),
            doctor=DoctorSettings(default_policy=RemedyPolicy.REPORT, memory_bytes=memory_bytes),
            doctor_context=DoctorContext(num_classes=task.num_classes, is_initial=is_initial),
        )
    except TrainingHalted as error:
        diagnosis = error.diagnosis
    except Exception as error:
        # The task's own code may raise anything; the command shows it.
        failure = error
    return FirstSteps(num_steps=num_steps, losses=tuple(losses), diagnosis=diagnosis, error=failure)


def inspect_first_steps(steps: FirstSteps) -> Check:
    """Check how the first steps went."""
    if steps.diagnosis is not None:
        result = f"{steps.diagnosis.cause} at step {steps.diagnosis.step} of {steps.num_steps}"
        return Check(severity=Severity.ERROR, subject="first steps", result=result)
    if steps.error is not None:
        result = f"step {len(steps.losses) + 1} failed with {in_one_line(steps.error)}"
        return Check(severity=Severity.ERROR, subject="first steps", result=result)
    first = fmean(steps.losses[:_NUM_COMPARED])
    last = fmean(steps.losses[-_NUM_COMPARED:])
    result = f"{steps.num_steps}, loss {first:.4g} to {last:.4g}"
    if last >= first:
        result += ": it doesn't fall"
        return Check(severity=Severity.WARNING, subject="first steps", result=result)
    return Check(severity=Severity.OK, subject="first steps", result=result)


class _FirstBatches:
    """Yields `num_batches` batches in one pass; begins the data again if it has fewer."""

    def __init__(self, loader: DataLoader[Any], num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        passes = itertools.chain.from_iterable(itertools.repeat(self._loader))
        return itertools.islice(passes, self._num_batches)

    @property
    def newest_indices(self) -> list[int] | None:
        return getattr(self._loader, "newest_indices", None)


@dataclass
class _Summary:
    """Figures of each example, in the order of the data set; `extent` describes all inputs."""

    num: int = 0
    input_shape: Sequence[int] = ()
    input_dtype: str = ""
    extent: str = ""
    num_nan: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_inf: Tensor = field(default_factory=lambda: torch.zeros(0))
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))
    is_constant: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    targets: Tensor = field(default_factory=lambda: torch.zeros(0))


def _are_pairs(task: Task, examples: Examples) -> bool:
    """Return whether the first batch is (inputs, targets), a tensor each."""
    first = next(iter(batches_in_order(task, examples, batch_size=1)), None)
    return (
        isinstance(first, tuple | list)
        and len(first) == 2
        and all(isinstance(part, Tensor) for part in first)
    )


def _summarise(task: Task, examples: Examples) -> _Summary:
    rows_of: list[tuple[Tensor, ...]] = []
    low, high = torch.inf, -torch.inf
    seen = _Summary()
    if count_examples(task, examples, loaded_by="load_train") == 0:
        return seen
    for inputs, targets in batches_in_order(task, examples, batch_size=_CHUNK):
        rows = inputs.reshape(len(inputs), -1).double()
        is_finite = rows.isfinite()
        largest = torch.where(is_finite, rows.abs(), 0.0)
        is_constant = (rows == rows[:, :1]).all(1) & (rows.shape[1] >= _MIN_ENTRIES)
        rows_of.append(
            (rows.isnan().sum(1), rows.isinf().sum(1), largest.amax(1), is_constant, targets)
        )
        if bool(is_finite.any()):
            low = min(low, float(rows[is_finite].min()))
            high = max(high, float(rows[is_finite].max()))
        seen.input_shape = tuple(inputs.shape[1:])
        seen.input_dtype = str(inputs.dtype).removeprefix("torch.")
    if low <= high:
        seen.extent = f" from {low:.4g} to {high:.4g}"
    columns = [torch.cat(column) for column in zip(*rows_of, strict=True)]
    seen.num_nan, seen.num_inf, seen.largest, seen.is_constant, seen.targets = columns
    seen.num = len(seen.targets)
    return seen


def _outliers(largest: Tensor) -> Tensor:
    """Return which examples' largest magnitudes are far above all others, bool [n].

    Far: 20 robust standard deviations (1.4826 times the median absolute deviation, at least a tenth
    of the median) above the median, and 10 times the 99th percentile.
    """
    median, deviation = median_and_deviation(largest)
    usual = largest.sort().values[int(_USUAL_SHARE * (len(largest) - 1))]
    is_far = largest > median + OUTLIER_DEVIATIONS * deviation
    return is_far & (largest > OUTLIER_FACTOR * usual) & (usual > 0)


def _labels_in_words(labels: Tensor | None, task: Task) -> str:
    if labels is None:
        return "the targets are no whole numbers"
    low, high = labels.min().item(), labels.max().item()
    bound = "" if task.num_classes is None else f", all from 0 to {task.num_classes - 1}"
    return f"{low} to {high}{bound}"


def _histogram(labels: Tensor, task: Task) -> Check:
    counts = labels.flatten().clamp(min=0).bincount(minlength=task.num_classes or 0)
    num_present = int((counts > 0).sum())
    if len(counts) <= _MAX_CLASSES_LISTED:
        result = "  ".join(f"{label}: {count}" for label, count in enumerate(counts.tolist()))
    else:
        share = counts.max().item() / max(1, int(counts.sum()))
        result = (
            f"{num_present} of {len(counts)}, the commonest {counts.argmax().item()} ({share:.0%})"
        )
    severity = Severity.OK if num_present > 1 else Severity.WARNING
    return Check(severity=severity, subject="classes", result=result)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NUM_LISTED]))
    more = f" and {len(numbers) - _NUM_LISTED} more" if len(numbers) > _NUM_LISTED else ""
    count = "1 example" if len(numbers) == 1 else f"{len(numbers)} examples"
    return f"{count}: number {shown}{more}"

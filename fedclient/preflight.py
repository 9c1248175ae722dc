"""A client's data, first weights and first steps, examined before it joins a run.

Everything stays on this machine: what is found may name examples by number.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from fedrounds.data import make_loader
from fedrounds.data.loaders import NumberedLoader
from fedrounds.diagnosis.values import Diagnosis, DoctorSettings, RemedyPolicy
from fedrounds.doctor import TrainingHalted
from fedrounds.doctor.anomalies import unusual_entries, usual_state
from fedrounds.doctor.batches import are_out_of_range
from fedrounds.doctor.history import Snapshot
from fedrounds.errors import FederationError
from fedrounds.plugins import in_one_line
from fedrounds.tasks.task import Examples, Task
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import StepProgress, train_model
from fedrounds.training.trial import try_training_step
from fedrounds.types import TrainingConfig

_CHUNK = 256
_OUTLIER_DEVIATIONS = 20.0
_OUTLIER_FACTOR = 10.0
_USUAL_SHARE = 0.99
_NORMAL_PER_MAD = 1.4826
_MIN_ENTRIES = 16
"""An input of fewer numbers may well hold one number only."""
_NUM_LISTED = 5
_MAX_CLASSES_LISTED = 12
_NUM_COMPARED = 5


class Mark(StrEnum):
    """How well something is."""

    WELL = "well"
    ODD = "odd"
    """Worth a look; training goes well with it."""
    BAD = "bad"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One thing that was looked at, and what was found, in words."""

    mark: Mark
    what: str
    found: str


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """How the first steps of a training went.

    `diagnosis` and `error` (what the task's own code raised) are None where they went well.
    """

    num_steps: int
    losses: tuple[float, ...]
    diagnosis: Diagnosis | None
    error: Exception | None = None


def examine_data(examples: Examples, task: Task) -> list[Observation]:
    """Look at every example: what isn't finite, what is far from all others, labels, blanks."""
    seen = _look_through(examples)
    observations = [
        Observation(
            mark=Mark.WELL,
            what="examples",
            found=f"{seen.num}, inputs {list(seen.input_shape)} {seen.input_dtype}{seen.extent}",
        )
    ]
    if seen.num == 0:
        return [Observation(mark=Mark.BAD, what="examples", found="none")]
    may_be_bad = Mark.BAD if task.finite_inputs else Mark.ODD
    outliers = _outliers(seen.largest)
    labels = None if seen.targets.is_floating_point() else seen.targets
    wrong = torch.zeros(seen.num, dtype=torch.bool)
    if labels is not None and task.num_classes is not None:
        wrong = are_out_of_range(labels, task.num_classes).reshape(seen.num, -1).any(1)
    for what, odd, mark, well in (
        ("NaN", seen.num_nan > 0, may_be_bad, "none"),
        ("infinity", seen.num_inf > 0, may_be_bad, "none"),
        ("outliers", outliers, Mark.BAD, "none"),
        ("blank inputs", seen.is_constant, Mark.ODD, "none"),
        ("labels", wrong, Mark.BAD, _labels_in_words(labels, task)),
    ):
        numbers = odd.nonzero().flatten().tolist()
        found = well if not numbers else f"{_listed(numbers)}{_BESIDES.get(what, '')}"
        if numbers and what == "outliers":
            usual = seen.largest.median().item()
            found += f" (up to {seen.largest[odd].max().item():.4g}, usual {usual:.4g})"
        if numbers and what == "labels":
            assert task.num_classes is not None
            found += f" (not from 0 to {task.num_classes - 1})"
        observations.append(
            Observation(mark=mark if numbers else Mark.WELL, what=what, found=found)
        )
    if labels is not None and labels.numel():
        observations.append(_histogram(labels[~wrong], task))
    return observations


_BESIDES = {"blank inputs": " (all of its numbers are the same)"}


def examine_weights(model: nn.Module, *, is_initial: bool = True) -> Observation:
    """Compare a model's weights, first or received ones, with those that its modules draw."""
    tensors = [one.detach() for one in (*model.parameters(), *model.buffers())]
    start = Snapshot(step=0, tensors=tensors, optimizer_state=[], groups=[], scheduler_state=None)
    odd = unusual_entries(model, start, usual_state(model), is_initial=is_initial)
    num = sum(one.numel() for one in model.parameters())
    if not odd:
        return Observation(mark=Mark.WELL, what="weights", found=f"{num}, of usual sizes")
    names = ", ".join(odd[:_NUM_LISTED]) + (", ..." if len(odd) > _NUM_LISTED else "")
    return Observation(
        mark=Mark.BAD,
        what="weights",
        found=f"unlike what torch draws: {names} (10 times too large or small, or all the same)",
    )


def examine_answers(
    model: nn.Module, examples: Examples, task: Task, device: torch.device
) -> Observation:
    """Say how good a received model is on a client's examples."""
    loader = make_loader(examples, batch_size=_CHUNK, shuffle=False)
    found = evaluate(model, loader, task.loss, device)
    is_well = math.isfinite(found.loss)
    return Observation(
        mark=Mark.WELL if is_well else Mark.BAD,
        what="answers",
        found=f"{found.accuracy:.2%} of this data right, loss {found.loss:.4g}",
    )


def examine_trial(
    task: Task, examples: Examples, device: torch.device
) -> tuple[Observation, Exception | None]:
    """Say whether a client's examples, model and loss fit each other, and what was raised if not.

    It is the trial step that a client takes before it joins a run.
    """
    try:
        try_training_step(task, examples, device=device)
    except FederationError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return Observation(mark=Mark.BAD, what="trial step", found=in_one_line(cause)), cause
    found = "forward pass, loss and backward pass work"
    return Observation(mark=Mark.WELL, what="trial step", found=found), None


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
    """Train for some steps with the doctor, which says what goes wrong and cures nothing.

    `is_initial` says whether the weights are freshly initialised rather than received.
    """
    losses: list[float] = []

    def note(taken: StepProgress) -> None:
        losses.append(taken.loss)

    diagnosis, failure = None, None
    try:
        train_model(
            model,
            _FirstBatches(
                make_loader(examples, batch_size=training.batch_size, seed=seed), num_steps
            ),
            epochs=1,
            lr=training.lr,
            device=device,
            loss=task.loss,
            optimizer=training.optimizer,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            on_step=note,
            doctor=DoctorSettings(default_policy=RemedyPolicy.REPORT, memory_bytes=memory_bytes),
            num_classes=task.num_classes,
            is_initial=is_initial,
        )
    except TrainingHalted as error:
        diagnosis = error.diagnosis
    except Exception as error:
        # The task's own code may raise anything: the person here is shown it.
        failure = error
    return FirstSteps(num_steps=num_steps, losses=tuple(losses), diagnosis=diagnosis, error=failure)


def examine_steps(steps: FirstSteps) -> Observation:
    """Say how the first steps went."""
    if steps.diagnosis is not None:
        found = f"{steps.diagnosis.cause} at step {steps.diagnosis.step} of {steps.num_steps}"
        return Observation(mark=Mark.BAD, what="first steps", found=found)
    if steps.error is not None:
        found = f"step {len(steps.losses) + 1} failed with {in_one_line(steps.error)}"
        return Observation(mark=Mark.BAD, what="first steps", found=found)
    first, last = (
        sum(part) / len(part)
        for part in (steps.losses[:_NUM_COMPARED], steps.losses[-_NUM_COMPARED:])
    )
    found = f"{steps.num_steps}, loss {first:.4g} to {last:.4g}"
    if last >= first:
        return Observation(mark=Mark.ODD, what="first steps", found=f"{found}: it doesn't fall")
    return Observation(mark=Mark.WELL, what="first steps", found=found)


class _FirstBatches:
    """So many batches as one pass, over the data again where it has fewer."""

    def __init__(self, loader: NumberedLoader, num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        passes = itertools.chain.from_iterable(itertools.repeat(self._loader))
        return itertools.islice(passes, self._num_batches)

    @property
    def newest_indices(self) -> list[int]:
        return self._loader.newest_indices


@dataclass
class _Seen:
    """What is kept of each example, in the order of the data set; `extent` is of all inputs."""

    num: int = 0
    input_shape: Sequence[int] = ()
    input_dtype: str = ""
    extent: str = ""
    num_nan: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_inf: Tensor = field(default_factory=lambda: torch.zeros(0))
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))
    is_constant: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    targets: Tensor = field(default_factory=lambda: torch.zeros(0))


def _look_through(examples: Examples) -> _Seen:
    kept: list[tuple[Tensor, ...]] = []
    low, high = torch.inf, -torch.inf
    seen = _Seen()
    if len(examples) == 0:  # type: ignore[arg-type]  # Dataset itself declares no length
        return seen
    for inputs, targets in make_loader(examples, batch_size=_CHUNK, shuffle=False):
        rows = inputs.reshape(len(inputs), -1).double()
        is_finite = rows.isfinite()
        largest = torch.where(is_finite, rows.abs(), 0.0)
        is_constant = (rows == rows[:, :1]).all(1) & (rows.shape[1] >= _MIN_ENTRIES)
        kept.append(
            (rows.isnan().sum(1), rows.isinf().sum(1), largest.amax(1), is_constant, targets)
        )
        if bool(is_finite.any()):
            low = min(low, float(rows[is_finite].min()))
            high = max(high, float(rows[is_finite].max()))
        seen.input_shape = tuple(inputs.shape[1:])
        seen.input_dtype = str(inputs.dtype).removeprefix("torch.")
    if low <= high:
        seen.extent = f" from {low:.4g} to {high:.4g}"
    columns = [torch.cat(column) for column in zip(*kept, strict=True)]
    seen.num_nan, seen.num_inf, seen.largest, seen.is_constant, seen.targets = columns
    seen.num = len(seen.targets)
    return seen


def _outliers(largest: Tensor) -> Tensor:
    """Return which examples' largest absolute numbers are far from all others', bool [n].

    20 robust standard deviations (1.4826 times the median absolute deviation, at least a tenth of
    the median) above the median, and 10 times what 99 % of the examples stay below.
    """
    median = largest.median()
    spread = _NORMAL_PER_MAD * (largest - median).abs().median()
    spread = torch.maximum(spread, median / 10).clamp(min=torch.finfo(torch.float32).tiny)
    usual = largest.sort().values[int(_USUAL_SHARE * (len(largest) - 1))]
    is_far = largest > median + _OUTLIER_DEVIATIONS * spread
    return is_far & (largest > _OUTLIER_FACTOR * usual) & (usual > 0)


def _labels_in_words(labels: Tensor | None, task: Task) -> str:
    if labels is None:
        return "the targets are no whole numbers"
    low, high = labels.min().item(), labels.max().item()
    bound = "" if task.num_classes is None else f", all from 0 to {task.num_classes - 1}"
    return f"{low} to {high}{bound}"


def _histogram(labels: Tensor, task: Task) -> Observation:
    counts = labels.flatten().clamp(min=0).bincount(minlength=task.num_classes or 0)
    there = int((counts > 0).sum())
    if len(counts) <= _MAX_CLASSES_LISTED:
        found = "  ".join(f"{label}: {count}" for label, count in enumerate(counts.tolist()))
    else:
        share = counts.max().item() / max(1, int(counts.sum()))
        found = f"{there} of {len(counts)}, the commonest {counts.argmax().item()} ({share:.0%})"
    return Observation(mark=Mark.WELL if there > 1 else Mark.ODD, what="classes", found=found)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NUM_LISTED]))
    more = f" and {len(numbers) - _NUM_LISTED} more" if len(numbers) > _NUM_LISTED else ""
    count = "1 example" if len(numbers) == 1 else f"{len(numbers)} examples"
    return f"{count}: number {shown}{more}"

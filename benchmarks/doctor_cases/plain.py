"""The loop that everybody writes, with eyes that see where the first bad number arises.

Used for the healthy twins, for the two baselines, and to examine the cases themselves: whether
each planted fault does harm, and where.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from benchmarks.doctor_cases.training import Batch, Training
from fedrounds.diagnosis.values import StepPhase

MAX_HALVINGS = 8


class Sighting(NamedTuple):
    """The first bad number, or the first error: in which step, phase and module."""

    step: int
    phase: StepPhase
    module: str
    what: str


@dataclass(kw_only=True)
class PlainRun:
    """How a plain loop went. `step_s` are seconds on the clock."""

    score: float = 0.0
    is_finite: bool = True
    first: Sighting | None = None
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    num_repairs: int = 0

    @property
    def median_step_s(self) -> float:
        """A step's time, the first ones left out."""
        return statistics.median(self.step_s[3:] or self.step_s or [math.nan])


def train_plainly(training: Training, *, is_watched: bool = False) -> PlainRun:
    """Train to the end whatever happens; an error ends it.

    With `is_watched` the run says where the first bad number arose, at some cost.
    """
    run = PlainRun()
    step = 0
    for epoch in range(1, training.task.epochs + 1):
        for given in training.epoch(epoch):
            step += 1
            began = time.perf_counter()
            try:
                _take_step(training, given.batch, run, step=step, is_watched=is_watched)
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
                run.first = run.first or Sighting(step, StepPhase.FORWARD, "?", repr(error)[:90])
                run.is_finite = False
                return run
            run.step_s.append(time.perf_counter() - began)
    run.is_finite = is_finite(training.model)
    run.score = final_score(training)
    return run


def halve_the_rate(training: Training) -> PlainRun:
    """Train; on a NaN go back to the epoch's beginning and repeat it at half the rate."""
    run = PlainRun()
    epoch = 1
    kept = _state(training)
    while epoch <= training.task.epochs:
        if _try_epoch(training, epoch, run):
            epoch += 1
            kept = _state(training)
            continue
        if run.num_repairs == MAX_HALVINGS:
            run.is_finite = False
            return run
        run.num_repairs += 1
        _restore(training, kept)
        for group in training.optimizer.param_groups:
            group["lr"] *= 0.5**run.num_repairs
            if "initial_lr" in group:
                group["initial_lr"] *= 0.5
    run.is_finite = is_finite(training.model)
    run.score = final_score(training)
    return run


def skip_the_batch(training: Training) -> PlainRun:
    """Train; a step whose loss or gradient isn't finite, or that fails, isn't taken."""
    run = PlainRun()
    for epoch in range(1, training.task.epochs + 1):
        for given in training.epoch(epoch):
            try:
                loss, norm = _backward(training, given.batch)
            except (RuntimeError, ValueError, IndexError):
                run.num_repairs += 1
                continue
            if math.isfinite(loss) and math.isfinite(norm):
                training.optimizer.step()
            else:
                run.num_repairs += 1
            if training.scheduler is not None:
                training.scheduler.step()
    run.is_finite = is_finite(training.model)
    run.score = final_score(training)
    return run


def is_finite(model: nn.Module) -> bool:
    """Whether every entry of the state_dict is."""
    return all(
        bool(torch.isfinite(entry).all())
        for entry in model.state_dict().values()
        if entry.is_floating_point()
    )


def final_score(training: Training) -> float:
    """Return the score of the model as training left it: 0 where it can't even be used."""
    if not is_finite(training.model):
        return 0.0
    try:
        scored = training.score()
    except RuntimeError:
        return 0.0
    return scored if math.isfinite(scored) else 0.0


def _try_epoch(training: Training, epoch: int, run: PlainRun) -> bool:
    for given in training.epoch(epoch):
        try:
            loss, _ = _backward(training, given.batch)
            training.optimizer.step()
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            return False
        if training.scheduler is not None:
            training.scheduler.step()
        if not math.isfinite(loss) or not is_finite(training.model):
            return False
    return True


def _state(training: Training) -> tuple[Any, ...]:
    return (
        copy.deepcopy(training.model.state_dict()),
        copy.deepcopy(training.optimizer.state_dict()),
        None if training.scheduler is None else copy.deepcopy(training.scheduler.state_dict()),
    )


def _restore(training: Training, kept: tuple[Any, ...]) -> None:
    model, optimizer, scheduler = kept
    training.model.load_state_dict(model)
    training.optimizer.load_state_dict(copy.deepcopy(optimizer))
    if training.scheduler is not None:
        training.scheduler.load_state_dict(copy.deepcopy(scheduler))


def loss_of(returned: object) -> Tensor:
    """Return the loss in what a task's loss function returned."""
    loss = returned[0] if isinstance(returned, tuple) else returned
    assert isinstance(loss, Tensor)
    return loss


def _backward(training: Training, batch: Batch) -> tuple[float, float]:
    training.optimizer.zero_grad()
    loss = loss_of(training.task.loss(training.model, batch))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradients = [
        parameter.grad for parameter in training.model.parameters() if parameter.grad is not None
    ]
    norm, most = get_total_norm(gradients).item(), training.task.clip_norm
    # As train_model clips: exactly to the norm, where clip_grad_norm_ adds 1e-6 to the divisor.
    if most is not None and norm > most:
        for gradient in gradients:
            gradient.mul_(most / norm)
    return loss.item(), norm


def _take_step(
    training: Training, batch: Batch, run: PlainRun, *, step: int, is_watched: bool
) -> None:
    if is_watched and run.first is None:
        with _watching(training.model) as seen:
            loss, norm = _backward(training, batch)
        run.first = _first_of(seen, loss, training.model, step)
    else:
        loss, norm = _backward(training, batch)
    training.optimizer.step()
    if training.scheduler is not None:
        training.scheduler.step()
    run.losses.append(loss)
    run.grad_norms.append(norm)
    if is_watched and run.first is None and not _is_state_finite(training):
        run.first = Sighting(step, StepPhase.OPTIMIZER, "", "state or parameters")


def _is_state_finite(training: Training) -> bool:
    held = [
        value
        for state in training.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return is_finite(training.model) and all(bool(torch.isfinite(value).all()) for value in held)


def _first_of(
    seen: list[tuple[str, str]], loss: float, model: nn.Module, step: int
) -> Sighting | None:
    if seen:
        return Sighting(step, StepPhase.FORWARD, *seen[0])
    if not math.isfinite(loss):
        return Sighting(step, StepPhase.LOSS, "", f"loss {loss}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return Sighting(
                step, StepPhase.BACKWARD, name.rpartition(".")[0], f"gradient of {name}"
            )
    return None


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Yield a list that gets each module, innermost first, whose outputs aren't finite."""
    seen: list[tuple[str, str]] = []
    hooks = []
    for name, module in model.named_modules():

        def look(_: nn.Module, inputs: object, output: object, name: str = name) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            assert isinstance(inputs, tuple)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                    was_finite = all(
                        bool(torch.isfinite(given).all())
                        for given in inputs
                        if isinstance(given, Tensor) and given.is_floating_point()
                    )
                    seen.append((name, "output" if was_finite else "output of a bad input"))

        hooks.append(module.register_forward_hook(look))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

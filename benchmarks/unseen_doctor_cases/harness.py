"""The loops a training is run by: plain, skipping steps that aren't finite, and the doctor's."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.unseen_doctor_cases.case import Step, Training
from fedrounds.diagnosis.values import Diagnosis
from fedrounds.doctor import Doctor, TrainingHalted

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended.

    `score` is 0 where the model's weights or answers aren't finite, or where an error or the doctor
    ended the training. `error` is the error's name and text. `num_non_finite` counts steps whose
    loss wasn't finite.
    """

    score: float
    state: State
    num_non_finite: int = 0
    error: str = ""
    is_halted: bool = False
    diagnoses: tuple[Diagnosis, ...] = ()
    seconds: float = 0.0


def run_plain(training: Training, *, skips: bool = False) -> Outcome:
    """Train by the loop everybody writes.

    Args:
        training: begun anew for this call.
        skips: leave out the optimizer's step where the loss or a gradient isn't finite.
    """
    model, optimizer = training.model, training.optimizer
    model.train()
    num_non_finite, error, began = 0, "", time.perf_counter()
    for number, step in enumerate(training.steps, start=1):
        training.before_step(number)
        try:
            loss = compute_gradients(training, step)
        # An error of the case's own ends a plain training, whatever it is.
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            if not skips:
                break
            continue
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        is_finite = bool(loss.isfinite())
        num_non_finite += not is_finite
        if not skips or (is_finite and gradients_are_finite(model)):
            optimizer.step()
        if training.scheduler is not None:
            training.scheduler.step()
    return Outcome(
        score=final_score(training) if skips or not error else 0.0,
        state=copy_state(model),
        num_non_finite=num_non_finite,
        error=error,
        seconds=time.perf_counter() - began,
    )


def compute_gradients(training: Training, step: Step) -> Tensor:
    """Return the loss of a step's batch, after its backward pass."""
    training.optimizer.zero_grad()
    answer = training.compute_loss(training.model, step.batch)
    loss = answer[0] if isinstance(answer, tuple) else answer
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def run_doctored(training: Training) -> Outcome:
    """Train with the doctor in place of the plain loop's step."""
    training.model.train()
    doctor, error, is_halted, began = None, "", False, time.perf_counter()
    try:
        doctor = Doctor(
            training.model,
            training.optimizer,
            # The doctor passes the structure on that it is given.
            cast("Any", training.compute_loss),
            scheduler=training.scheduler,
            clip_norm=training.clip_norm,
            num_classes=training.num_classes,
        )
        for number, step in enumerate(training.steps, start=1):
            training.before_step(number)
            doctor.step(step.batch, indices=step.indices, epoch=step.epoch)
        doctor.finish()
    except TrainingHalted:
        is_halted = True
    # What else comes out of it is what the judge looks for.
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Outcome(
        score=0.0 if is_halted or error else final_score(training),
        state=copy_state(training.model),
        error=error,
        is_halted=is_halted,
        diagnoses=() if doctor is None else tuple(doctor.diagnoses),
        seconds=time.perf_counter() - began,
    )


def final_score(training: Training) -> float:
    """Return the final metric between 0 and 1; 0 where the model isn't finite."""
    model = training.model.eval()
    if not all(_is_finite(tensor) for tensor in model.state_dict().values()):
        return 0.0
    with torch.no_grad():
        value = training.score(model)
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def copy_state(model: nn.Module) -> State:
    """Return a copy of the weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def are_same(first: State, second: State) -> bool:
    """Whether two states are the same bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def gradients_are_finite(model: nn.Module) -> bool:
    """Return whether every gradient is finite."""
    # A sparse gradient is finite where its values are.
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return all(
        _is_finite(grad.coalesce().values() if grad.is_sparse else grad) for grad in gradients
    )

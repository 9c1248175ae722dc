"""A step as a plain loop takes it: what is left where the doctor itself has failed.

What it takes from the doctor's other modules is what any loop does; the rest may be what fails.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrounds.diagnosis.values import Cause, Diagnosis, Origin, StepPhase, Symptom
from fedrounds.doctor.batches import Batch, map_tensors, tensors_of
from fedrounds.doctor.history import RandomState, gradients_of, restore_extras
from fedrounds.doctor.outputs import loss_and_outputs
from fedrounds.doctor.reports import StepReport
from fedrounds.doctor.stepping import (
    Attempt,
    TrainingState,
    backward,
    end_step,
    optimizer_step,
)
from fedrounds.nested import map_leaves


class Live:
    """A copy of a training's state, and the things it was copied from."""

    def __init__(self, training: TrainingState) -> None:
        optimizer = training.optimizer
        self._training = training
        self._parameters: list[tuple[Tensor, Tensor]] = [
            (parameter, parameter.detach().clone()) for parameter in training.model.parameters()
        ]
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in training.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._state = [
            (parameter, {key: _copied(value) for key, value in state.items()})
            for parameter, state in optimizer.state.items()
        ]
        self._groups = [
            (group, {key: _copied(value) for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
        ]
        scheduler = training.scheduler
        self._schedule = None if scheduler is None else scheduler.state_dict()
        self._scaler = None if training.scaler is None else training.scaler.state_dict()
        averaged = training.averaged
        self._averaged = (
            None
            if averaged is None
            else {key: _copied(value) for key, value in averaged.state_dict().items()}
        )
        self._gradients = gradients_of(training)
        self._is_open = training.window.is_open

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the training back where it was."""
        for parameter, kept in self._parameters:
            if parameter.dtype == kept.dtype:
                parameter.copy_(kept)
            else:
                parameter.data = kept.clone()
            parameter.grad = None
        for module, name, held in self._buffers:
            buffer = module._buffers[name]
            if buffer is not None and (buffer.dtype, buffer.shape) == (held.dtype, held.shape):
                buffer.copy_(held)
            else:
                module._buffers[name] = held.clone()
        state = self._training.optimizer.state
        state.clear()
        for parameter, values in self._state:
            state[parameter] = {key: _copied(value) for key, value in values.items()}
        for group, values in self._groups:
            group.update({key: _copied(value) for key, value in values.items()})
        if self._training.scheduler is not None and self._schedule is not None:
            self._training.scheduler.load_state_dict(self._schedule)
        restore_extras(
            self._training,
            scaler_state=self._scaler,
            averaged_state=self._averaged,
            gradients=self._gradients,
        )
        self._training.window.is_open = self._is_open


def _copied(value: Any) -> Any:  # noqa: ANN401  # optimizers keep anything
    return map_leaves(
        value, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
    )


@dataclass(kw_only=True)
class Progress:
    """How far a watched step has come; changed on the way.

    `random_state` is that before the step. `attempt` is what forward, backward and the optimizer
    did so far. `live` is the state after the step, kept while experiments change it.
    """

    random_state: RandomState | None = None
    attempt: Attempt | None = None
    live: Live | None = None
    live_random_state: RandomState | None = None

    def set_aside(self, training: TrainingState, device: torch.device) -> None:
        """Keep the state as it is, before experiments change it."""
        self.live = Live(training)
        self.live_random_state = RandomState.now(device)

    def put_back(self, device: torch.device) -> None:
        """Put the state back as it was before the experiments."""
        assert self.live is not None
        self.live.put_back()
        self.restore_random_state(device)

    def restore_random_state(self, device: torch.device) -> None:
        """Put the generators where they were before the experiments."""
        assert self.live_random_state is not None
        self.live_random_state.restore(device)


def go_on(
    training: TrainingState,
    batch: Batch,
    progress: Progress,
    *,
    step: int,
    device: torch.device,
    updates: bool = True,
) -> StepReport:
    """Finish a step in which the doctor failed as a plain loop would have taken it.

    Raises:
        Exception: what the model or the loss raised in this step.
    """
    attempt = progress.attempt
    if progress.live is not None:
        progress.live.put_back()
    if attempt is None or not attempt.is_computed:
        if progress.random_state is not None:
            _rewind(progress.random_state, device)
        return plain_step(training, batch, step=step, updates=updates)
    if not attempt.is_stepped:
        if updates and training.needs_closure:
            assert progress.random_state is not None
            _rewind(progress.random_state, device)
            return plain_step(training, batch, step=step)
        descend_plainly(training, updates=updates)
    else:
        if updates and not attempt.is_ended:
            end_step(training)
        if progress.live_random_state is not None:
            _rewind(progress.live_random_state, device)
    assert attempt.loss is not None
    return report(training, batch, float(attempt.loss), attempt.outputs, step=step)


def plain_step(
    training: TrainingState, batch: Batch, *, step: int, updates: bool = True
) -> StepReport:
    """Take a step: zero_grad, forward, loss, backward, clipping, optimizer, scheduler."""
    loss, outputs = torch.zeros(()), None

    def compute() -> Tensor:
        nonlocal loss, outputs
        if not training.window.is_open:
            training.optimizer.zero_grad()
        loss, outputs = loss_and_outputs(training.compute_loss(training.model, batch))
        backward(training, loss)
        return loss

    if updates and training.needs_closure:
        training.optimizer.step(compute)  # type: ignore[arg-type]  # any number does
        end_step(training)
    else:
        compute()
        descend_plainly(training, updates=updates)
    return report(training, batch, float(loss.detach()), outputs, step=step)


def descend_plainly(training: TrainingState, *, updates: bool = True) -> None:
    """Clip as the training says, and take the optimizer's and the scheduler's step."""
    training.window.is_open = not updates
    if not updates:
        return
    if training.clip_norm is not None and training.scaler is not None:
        training.scaler.unscale_(training.optimizer)
    if training.clip_norm is not None:
        learned = [
            parameter for parameter in training.model.parameters() if parameter.grad is not None
        ]
        torch.nn.utils.clip_grad_norm_(learned, training.clip_norm)
    optimizer_step(training, None)
    end_step(training)


def report(
    training: TrainingState, batch: Batch, loss: float, outputs: object, *, step: int
) -> StepReport:
    """Return the report on a step that was taken plainly."""
    tensors = tensors_of(batch)
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=None,
        lr=float(training.optimizer.param_groups[0]["lr"]),
        outputs=map_tensors(outputs, Tensor.detach),
        batch=batch,
        num_classes=training.num_classes,
        batch_size=next((len(tensor) for tensor in tensors if tensor.ndim), 0),
    )


def last_word(training: TrainingState, *, step: int) -> Diagnosis | None:
    """Return the diagnosis of a model that isn't finite at the end, None if it is."""
    entries: Mapping[str, object] = training.model.state_dict()
    bad = next(
        (
            name
            for name, entry in entries.items()
            if isinstance(entry, Tensor)
            and (entry.is_floating_point() or entry.is_complex())
            and name not in training.non_finite
            and not bool(torch.isfinite(entry).all())
        ),
        None,
    )
    if bad is None:
        return None
    return Diagnosis(
        symptom=Symptom.NON_FINITE_PARAMETER,
        cause=Cause.UNKNOWN,
        step=step,
        noticed_at_step=step,
        epoch=1,
        batch=step,
        batch_size=0,
        lr=math.nan,
        origin=Origin(phase=StepPhase.OPTIMIZER, tensor=bad),
    )


def _rewind(random_state: RandomState, device: torch.device) -> None:
    torch.default_generator.set_state(random_state.cpu)
    if random_state.cuda is not None:
        torch.cuda.set_rng_state(random_state.cuda, device)

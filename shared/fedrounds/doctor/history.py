"""The history of a training, so that it can go back: states, and the batches between them."""

import cmath
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedrounds.diagnosis.values import Symptom
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.monitor import INTERVAL
from fedrounds.doctor.outside import Written
from fedrounds.doctor.stepping import Overrides, StepOutcome, TrainingState
from fedrounds.nested import leaves_of, map_leaves
from fedrounds.tensors.entries import norm_entries

_LEAST_REACH = 128
"""Where so many steps were taken and the limit allows it, they can be undone."""
_LARGE_STATE = 64 * 2**20
_COPY_SHARE = 0.02
_LONGEST_INTERVAL = 64
_SCHEDULED = ("lr", "momentum", "betas", "weight_decay")


class RandomState(NamedTuple):
    """Where torch's global generators are, so that dropout repeats."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return it as it is at this moment; `device` is the model's."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(cpu=torch.default_generator.get_state(), cuda=cuda)

    def restore(self, device: torch.device) -> None:
        """Put the generators where they were."""
        torch.default_generator.set_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training's state after `step` steps, 0 before the first: copies of all that a step reads.

    Random states are not in it: those are recorded with each step. `gradients` are those that wait
    for the optimizer's step, None where none do.
    """

    step: int
    tensors: list[Tensor]
    optimizer_state: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    scheduler_state: dict[str, Any] | None
    scaler_state: dict[str, Any] | None = None
    averaged_state: dict[str, Any] | None = None
    gradients: list[Tensor | None] | None = None

    @cached_property
    def num_bytes(self) -> int:
        """What the copies take."""
        state = leaves_of((self.optimizer_state, self.averaged_state, self.gradients))
        return sum(
            tensor.nbytes for tensor in (*self.tensors, *state) if isinstance(tensor, Tensor)
        )


def entries_of(training: TrainingState) -> list[Tensor]:
    """Return the model's own parameters and buffers, not copies, each once."""
    # In the order of model.parameters() and model.buffers(), which go through the modules slowly.
    modules = list(training.model.modules())
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    buffers = (buffer for module in modules for buffer in module._buffers.values())
    return list(dict.fromkeys(entry for entry in (*parameters, *buffers) if entry is not None))


def device_of(training: TrainingState) -> torch.device:
    """Return where the model is; the processor if it has no tensors."""
    return next((entry.device for entry in entries_of(training)), torch.device("cpu"))


@torch.no_grad()
def take_snapshot(training: TrainingState, *, step: int, spare: Snapshot | None = None) -> Snapshot:
    """Copy the state that a training has now, into the memory of a state that nobody needs."""
    optimizer = training.optimizer
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # New memory costs more than the copying.
    rooms = iter(() if spare is None else spare.tensors)
    states = iter(() if spare is None else spare.optimizer_state)
    return Snapshot(
        step=step,
        tensors=[_copy(entry, next(rooms, None)) for entry in entries_of(training)],
        optimizer_state=[
            _copied(optimizer.state.get(parameter, {}), next(states, {})) for parameter in learned
        ],
        groups=[
            {key: _copy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        scheduler_state=None if training.scheduler is None else training.scheduler.state_dict(),
        scaler_state=None if training.scaler is None else training.scaler.state_dict(),
        averaged_state=(
            None if training.averaged is None else _copied(training.averaged.state_dict())
        ),
        gradients=gradients_of(training) if training.window.is_open else None,
    )


def gradients_of(training: TrainingState) -> list[Tensor | None]:
    """Return copies of the parameters' gradients."""
    return [
        None if parameter.grad is None else parameter.grad.clone()
        for parameter in training.model.parameters()
    ]


def restore_extras(
    training: TrainingState,
    *,
    scaler_state: dict[str, Any] | None,
    averaged_state: dict[str, Any] | None,
    gradients: list[Tensor | None] | None,
) -> None:
    """Put back what stands beside the model and the optimizer."""
    if training.scaler is not None and scaler_state:
        training.scaler.load_state_dict(scaler_state)
        if training.scaler.is_enabled() and training.scaler._scale is not None:
            # Whether the gradients of a step were divided already is forgotten.
            training.scaler.update(training.scaler.get_scale())
    if training.averaged is not None and averaged_state is not None:
        training.averaged.load_state_dict(averaged_state)
    training.window.is_open = gradients is not None
    for parameter, gradient in zip(training.model.parameters(), gradients or (), strict=False):
        parameter.grad = None if gradient is None else gradient.clone()


def restore_snapshot(training: TrainingState, snapshot: Snapshot) -> None:
    """Put a training back where it was, bit for bit."""
    with torch.no_grad():
        for entry, kept in zip(entries_of(training), snapshot.tensors, strict=True):
            if entry.dtype == kept.dtype and entry.shape == kept.shape:
                entry.copy_(kept)
            else:
                entry.data = kept.clone()
    optimizer = training.optimizer
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.clear()
    for parameter, state in zip(learned, snapshot.optimizer_state, strict=True):
        if state:
            optimizer.state[parameter] = _copied(state)
    restore_schedule(training, snapshot)
    optimizer.zero_grad()
    restore_extras(
        training,
        scaler_state=snapshot.scaler_state,
        averaged_state=snapshot.averaged_state,
        gradients=snapshot.gradients,
    )


def restore_schedule(training: TrainingState, snapshot: Snapshot) -> None:
    """Put the learning rate and what changes it back where they were."""
    for group, saved in zip(training.optimizer.param_groups, snapshot.groups, strict=True):
        group.update({key: _copy(value) for key, value in saved.items()})
    if training.scheduler is not None and snapshot.scheduler_state is not None:
        training.scheduler.load_state_dict(snapshot.scheduler_state)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what a schedule changes in each of the optimizer's groups, as it is now."""
    return [
        {key: _copy(group[key]) for key in _SCHEDULED if key in group}
        for group in optimizer.param_groups
    ]


def restore_settings(training: TrainingState, recorded: "Recorded") -> None:
    """Set what a schedule had set before a recorded step, whoever stepped that schedule."""
    for group, saved in zip(training.optimizer.param_groups, recorded.settings, strict=True):
        group.update({key: _copy(value) for key, value in saved.items()})


def non_finite_buffers(model: nn.Module) -> frozenset[str]:
    """Return the names of the buffers that aren't finite, such as a mask of -inf.

    Before the first step that is what the model is meant to be: where such a value does harm, the
    forward pass shows it. A norm layer's running statistics don't count: nobody means those not to
    be finite.
    """
    statistics = norm_entries(model)
    return frozenset(
        name
        for name, buffer in model.named_buffers()
        if name not in statistics and not bool(buffer.isfinite().all())
    )


def is_finite(training: TrainingState) -> bool:
    """Whether parameters, buffers and the optimizer's state are, but for `training.non_finite`."""
    exempt = (
        {
            id(buffer)
            for name, buffer in training.model.named_buffers()
            if name in training.non_finite
        }
        if training.non_finite
        else set()
    )
    tensors = [
        entry for entry in entries_of(training) if _is_real(entry) and id(entry) not in exempt
    ]
    for state in training.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.ndim > 0 and _is_real(value):
                tensors.append(value)
    return are_finite(tensors)


def _is_real(tensor: Tensor) -> bool:
    """Whether a tensor can hold what isn't finite; complex numbers can, too."""
    return tensor.is_floating_point() or tensor.is_complex()


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether floating-point tensors have no NaN and no infinity; one wait for the device."""
    # Sums screen in half the time of norms; where one isn't finite a number is bad or it overflows.
    sums = [tensor.sum() for tensor in tensors]
    if len({total.device for total in sums}) == 1:
        sums = [torch.stack(sums).sum()]
    if all(cmath.isfinite(total.item()) for total in sums):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def first_bad_entry(training: TrainingState) -> str | None:
    """Return the name of the first parameter or buffer that isn't finite, None if all are."""
    named = [*training.model.named_parameters(), *training.model.named_buffers()]
    return next(
        (
            name
            for name, entry in named
            if name not in training.non_finite and not bool(entry.isfinite().all())
        ),
        None,
    )


def symptom_of_state(training: TrainingState) -> tuple[Symptom, str]:
    """Return the symptom of a state that isn't finite, and the bad entry's name, "" for none."""
    name = first_bad_entry(training)
    if name is None:
        return Symptom.NON_FINITE_OPTIMIZER_STATE, ""
    parameters = dict(training.model.named_parameters())
    symptom = Symptom.NON_FINITE_PARAMETER if name in parameters else Symptom.NON_FINITE_BUFFER
    return symptom, name


def first_bad_gradient(training: TrainingState) -> str | None:
    """Return the name of the first parameter whose gradient isn't finite, None if all are."""
    named = training.model.named_parameters()
    return next(
        (
            name
            for name, parameter in named
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ),
        None,
    )


class Recorded(NamedTuple):
    """A step as it was taken: enough to take it again.

    `settings` are the rates and the like that were set before it, `num_bytes` what the batch takes.
    Without `updates` its gradients were kept for the next step. `written` is what something else
    than the step before wrote into since then.
    """

    # Every step makes a record, and this costs a third of a frozen dataclass.
    step: int
    epoch: int
    batch_number: int
    batch: Batch
    indices: Sequence[int] | None
    random_state: RandomState
    settings: list[dict[str, Any]]
    treatment: Overrides
    outcome: StepOutcome
    num_bytes: int
    updates: bool = True
    written: frozenset[Written] = frozenset()


class StepHistory:
    """Owns the states kept and the steps since the oldest of them, within a byte limit.

    States get rarer with age: two neighbours are at most about half the age of the younger state
    apart. The oldest stays until the next state is 128 steps old. At least one state stays,
    whatever the limit.
    """

    def __init__(self, *, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._num_bytes = self._state_bytes = 0
        self.snapshots: list[Snapshot] = []
        self.steps: deque[Recorded] = deque()
        self._pinned: Snapshot | None = None
        self._interval = INTERVAL

    def pace(self, *, copy_s: float, step_s: float) -> None:
        """Keep large states so seldom that copying them takes a small share of the time.

        Small states are kept every eight steps whatever the clock says, so that a run repeats.
        """
        if step_s > 0 and self.snapshots and self.snapshots[-1].num_bytes > _LARGE_STATE:
            steps = math.ceil(copy_s / (_COPY_SHARE * step_s))
            self._interval = min(max(steps, INTERVAL), _LONGEST_INTERVAL)

    def pin(self, snapshot: Snapshot | None) -> None:
        """Keep this state, one of `snapshots`, whatever its age; None: no state."""
        self._pinned = snapshot

    def has_pinned(self) -> bool:
        """Whether the pinned state is still there: the byte limit holds for it, too."""
        return any(snapshot is self._pinned for snapshot in self.snapshots)

    def until(self, step: int) -> "StepHistory":
        """Return what was kept when this step had just been taken."""
        earlier = StepHistory(memory_bytes=self._memory_bytes)
        earlier.snapshots = [snapshot for snapshot in self.snapshots if snapshot.step < step]
        earlier.steps = deque(recorded for recorded in self.steps if recorded.step <= step)
        return earlier

    def is_snapshot_due(self, step: int) -> bool:
        """Whether a state is to be kept after `step` steps.

        A replay repeats at most the steps since the last state to reach a bad step.
        """
        since = step - self.snapshots[-1].step
        # Beside a state that is itself beyond the limit the batches get a share of it.
        least = self.snapshots[-1].num_bytes + self._memory_bytes // 4
        return since >= self._interval or self._num_bytes > max(self._memory_bytes, least)

    def make_room(self, step: int) -> Snapshot | None:
        """Drop the states that a new state after `step` makes superfluous; return one of them."""
        kept: list[Snapshot] = []
        dropped = None
        newer = step
        for position in reversed(range(len(self.snapshots))):
            state = self.snapshots[position]
            if newer <= step - _LEAST_REACH:
                is_needed = False
            else:
                # The oldest has no neighbour that could stand in for it.
                older = self.snapshots[position - 1].step if position else -math.inf
                is_needed = newer - older > (step - state.step) / 2
            if is_needed or state is self._pinned:
                kept.append(state)
                newer = state.step
            else:
                dropped = state
        self._set_snapshots(kept[::-1])
        return dropped

    def keep(self, snapshot: Snapshot) -> None:
        """Keep a state, and drop what age and limit don't allow."""
        self.make_room(snapshot.step)
        self._set_snapshots([*self.snapshots, snapshot])
        while len(self.snapshots) > 1 and self._num_bytes > self._memory_bytes:
            self._set_snapshots(self.snapshots[1:])

    def record(self, recorded: Recorded) -> None:
        """Keep a step."""
        self.steps.append(recorded)
        self._num_bytes += recorded.num_bytes

    def clear(self) -> None:
        """Forget all states and steps."""
        self.steps.clear()
        self.snapshots.clear()
        self._num_bytes = self._state_bytes = 0

    def rewind(self, step: int) -> None:
        """Forget the states and steps after `step`."""
        self._set_snapshots([snapshot for snapshot in self.snapshots if snapshot.step <= step])
        while self.steps and self.steps[-1].step > step:
            self._num_bytes -= self.steps.pop().num_bytes

    def between(self, after: int, until: int) -> list[Recorded]:
        """Return the steps after step `after`, up to and including step `until`."""
        return [recorded for recorded in self.steps if after < recorded.step <= until]

    def _set_snapshots(self, snapshots: list[Snapshot]) -> None:
        """Keep these states, and drop the steps that none of them leads to."""
        self._num_bytes += sum(snapshot.num_bytes for snapshot in snapshots) - self._state_bytes
        self._state_bytes = sum(snapshot.num_bytes for snapshot in snapshots)
        self.snapshots = snapshots
        oldest = snapshots[0].step if snapshots else math.inf
        while self.steps and self.steps[0].step <= oldest:
            self._num_bytes -= self.steps.popleft().num_bytes


def _copy(value: Any, room: Any = None) -> Any:  # noqa: ANN401  # optimizers keep anything
    if isinstance(value, list | dict):
        # L-BFGS keeps lists of tensors, and adds to them.
        return map_leaves(value, _copy)
    if not isinstance(value, Tensor):
        return value
    if isinstance(room, Tensor) and _is_alike(value, room):
        return room.copy_(value)
    return value.detach().clone()


def _is_alike(value: Tensor, room: Tensor) -> bool:
    is_same_kind = value.dtype == room.dtype and value.device == room.device
    return is_same_kind and value.shape == room.shape and value.stride() == room.stride()


def _copied(
    state: dict[str, Any], room: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    return {key: _copy(value, room.get(key)) for key, value in state.items()}

"""One training as a value: what is learned, by which steps, and what was done to spoil it.

A `Task` is a sane training; a `Fault` is one thing changed in it. The healthy twin of a planted
case is the same task, from the same seed, without the fault.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedrounds.seeds import derive_seed

DRAW: ContextVar[int] = ContextVar("DRAW", default=0)
"""Which draw of all that is random is in force: docs/doctor.md reports draw 0."""
Data = dict[str, Tensor]
"""Tensors by name, all with the samples in dimension 0."""
Batch = Any
"""A tensor, a tuple or a dict of tensors, as the task's form says."""
ComputeLoss = Callable[[nn.Module, Batch], Any]
"""(model, batch) to the loss, or to (loss, outputs)."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which samples make up which batch: a permutation of `num_examples` in every epoch."""

    num_examples: int
    batch_size: int
    epochs: int
    seed: int
    is_shuffled: bool = True

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the indices int64 [batch] of each batch of an epoch (from 1)."""
        drawn = torch.Generator().manual_seed(
            derive_seed(self.seed, "doctor-cases-order", round_number=DRAW.get(), attempt=epoch)
        )
        order = (
            torch.randperm(self.num_examples, generator=drawn)
            if self.is_shuffled
            else torch.arange(self.num_examples)
        )
        return torch.split(order, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return -(-self.num_examples // self.batch_size)

    @property
    def num_steps(self) -> int:
        """How many batches there are in all epochs."""
        return self.steps_per_epoch * self.epochs

    def at(self, step: int) -> list[int]:
        """Return the indices of the samples of a step (from 1)."""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        indices: list[int] = self.batches(epoch + 1)[batch].tolist()
        return indices


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training that goes well.

    `load` gives training and test data; `build` a model from the global generator; `score` a
    number up to 1 (accuracy, or R^2 of a regression) of a model on the test data. `least_score` is
    what a healthy run reaches.
    """

    architecture: str
    load: Callable[[], tuple[Data, Data]]
    build: Callable[[], nn.Module]
    loss: ComputeLoss
    optimizer: Callable[[nn.Module], Optimizer]
    score: Callable[[nn.Module, Data], float]
    num_examples: int
    batch_size: int
    epochs: int
    least_score: float = 0.97
    form: Literal["tuple", "dict", "tensor"] = "tuple"
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    clip_norm: float | None = None
    num_classes: int | None = None
    is_initial: bool = True
    fresh_state: Callable[[], Mapping[str, Tensor]] | None = None
    has_indices: bool = True
    is_shuffled: bool = True
    prepare: Callable[[nn.Module, Optimizer], None] | None = None
    """What a training has behind it before it begins: earlier steps, a loaded state."""

    def order(self, seed: int) -> Order:
        """Return the order of the samples that a seed gives."""
        return Order(
            num_examples=self.num_examples,
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=seed,
            is_shuffled=self.is_shuffled,
        )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is changed in a task; whatever is None stays.

    `data` changes the training data in place, `weights` the model before training, `state` the
    optimizer before training, `batch` a step's batch and indices on its way (None: as it was),
    `between` whatever it likes just before a step. `overrides` are fields of the task.
    """

    data: Callable[[Data], None] | None = None
    weights: Callable[[nn.Module], None] | None = None
    state: Callable[[nn.Module, Optimizer], None] | None = None
    batch: Callable[[int, Batch], Batch | None] | None = None
    between: Callable[[int, nn.Module], None] | None = None
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class Step(NamedTuple):
    """What a training step is given."""

    batch: Batch
    indices: list[int] | None


@dataclass(kw_only=True)
class Training:
    """A training ready to begin, with a fresh model and optimizer."""

    task: Task
    order: Order
    data: Data
    test: Data
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    fault: Fault

    def epoch(self, epoch: int) -> Iterator[Step]:
        """Yield the steps of an epoch (from 1)."""
        first = (epoch - 1) * self.order.steps_per_epoch + 1
        for step, indices in zip(itertools.count(first), self.order.batches(epoch), strict=False):
            if self.fault.between is not None:
                self.fault.between(step, self.model)
            batch = pack({name: tensor[indices] for name, tensor in self.data.items()}, self.task)
            numbers = indices.tolist() if self.task.has_indices else None
            changed = None if self.fault.batch is None else self.fault.batch(step, batch)
            if changed is None:
                yield Step(batch, numbers)
            else:
                # Its samples aren't those of the data set any more.
                yield Step(changed, None)

    def score(self) -> float:
        """Return the task's score of the model as it is now."""
        self.model.eval()
        with torch.no_grad():
            scored = self.task.score(self.model, self.test)
        self.model.train()
        return scored


def pack(data: Data, task: Task) -> Batch:
    """Return named tensors in the form that the task's loss takes."""
    if task.form == "dict":
        return data
    tensors = tuple(data.values())
    return tensors if task.form == "tuple" else tensors[0]


_NO_FAULT = Fault()


def begin(task: Task, *, seed: int, fault: Fault = _NO_FAULT) -> Training:
    """Return a training at its beginning; the same arguments give the same bits."""
    task = replace(task, **fault.overrides)
    train, test = task.load()
    data = {name: tensor[: task.num_examples].clone() for name, tensor in train.items()}
    if fault.data is not None:
        fault.data(data)
    torch.manual_seed(derive_seed(seed, "doctor-cases-weights", round_number=DRAW.get()))
    model = task.build().train()
    if task.is_initial and fault.weights is not None:
        fault.weights(model)
    optimizer = task.optimizer(model)
    if task.prepare is not None:
        task.prepare(model, optimizer)
    # What was received has its earlier training behind it, and was spoiled after that.
    if not task.is_initial and fault.weights is not None:
        fault.weights(model)
    if fault.state is not None:
        fault.state(model, optimizer)
    torch.manual_seed(derive_seed(seed, "doctor-cases-training", round_number=DRAW.get()))
    return Training(
        task=task,
        order=task.order(seed),
        data=data,
        test=test,
        model=model,
        optimizer=optimizer,
        scheduler=None if task.scheduler is None else task.scheduler(optimizer),
        fault=fault,
    )

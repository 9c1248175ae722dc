"""A case: a fault planted in a sane training, and the diagnosis that is expected."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from torch import Tensor

from benchmarks.doctor_cases.training import DRAW, Fault, Task, Training, begin
from fedrounds.diagnosis.values import Cause, StepPhase

TOLERANCE = 0.005
"""How far below the healthy twin's score a cured training may end."""


_NORMALISED = ("MLP with BatchNorm", "TabularMLP")


class Outcome(StrEnum):
    """How it is to end."""

    CURED = "cured"
    """Training goes on and ends at the healthy twin's score."""
    HALTED = "halted"
    """Nothing a client may do heals it: training stops and says so."""
    CURED_OR_HALTED = "cured or halted"
    """Stopping is honest, for a cure takes more than a few remedies; but a training that goes on
    must end at the healthy twin's score."""
    EITHER = "either"
    """Going on with a finite model and stopping are both honest."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected diagnosis; an empty set and None are not judged.

    `modules` are those in which the first bad value may be said to arise; `step` is the step in
    which it does. `positions` are the bad samples of that batch, judged where the diagnosed
    cause is bad data or a bad label; `indices` are the same in the data set. With `may_add_one`,
    under BatchNorm, a set that was verified to fail alone may hold one good sample more: a sample
    by itself can't be normalised.
    """

    causes: frozenset[Cause]
    phases: frozenset[StepPhase] = frozenset()
    modules: frozenset[str] = frozenset()
    step: int | None = None
    positions: frozenset[int] | None = None
    indices: frozenset[int] | None = None
    may_add_one: bool = False
    outcome: Outcome = Outcome.CURED


@dataclass(frozen=True, kw_only=True)
class Case:
    """A planted fault. `twin` are fields of the task by which the healthy twin differs."""

    name: str
    task: Task
    seed: int
    fault: Fault
    expected: Expected
    twin: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def begin(self) -> Training:
        """Return the spoiled training at its beginning."""
        return begin(self.task, seed=self.seed, fault=self.fault)

    def begin_twin(self) -> Training:
        """Return the healthy twin at its beginning."""
        return begin(self.task, seed=self.seed, fault=Fault(overrides=self.twin))


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """A training in which no alarm may sound.

    `least_score` is what it reaches in a plain loop. Where there is nothing to learn (noise, a rate
    next to nothing) it is 0.
    """

    name: str
    task: Task
    seed: int
    least_score: float
    fault: Fault = field(default_factory=Fault)

    def begin(self) -> Training:
        """Return the training at its beginning."""
        return begin(self.task, seed=self.seed, fault=self.fault)


HealthyRow = tuple[str, Task, float]
"""A healthy run's name, its task and what it reaches."""


def row(name: str, task: Task, least_score: float, **changes: object) -> HealthyRow:
    """Return a row in which the task has some fields changed."""
    fields: dict[str, Any] = dict(changes)
    return name, replace(task, **fields), least_score


def drawing(name: str) -> random.Random:
    """Return the frozen random numbers of a case."""
    return random.Random(f"{name}/{DRAW.get()}" if DRAW.get() else name)


def log_uniform(draw: random.Random, low: float, high: float) -> float:
    """Return a number drawn evenly on a logarithmic scale."""
    factor: float = (high / low) ** draw.random()
    return low * factor


def one_value(*values: float) -> Callable[[Tensor, random.Random], None]:
    """Return a function that puts each value somewhere into a sample."""

    def change(sample: Tensor, draw: random.Random) -> None:
        flat = sample.view(-1)
        for value, at in zip(values, draw.sample(range(len(flat)), len(values)), strict=True):
            flat[at] = value

    return change


def every_value(value: float) -> Callable[[Tensor, random.Random], None]:
    """Return a function that fills a sample with a value."""

    def change(sample: Tensor, _: random.Random) -> None:
        sample.fill_(value)

    return change


def plant_samples(
    name: str,
    task: Task,
    *,
    key: str,
    change: Callable[[Tensor, random.Random], None],
    steps: Mapping[int, int],
    seed: int,
    causes: frozenset[Cause],
    phases: frozenset[StepPhase],
    modules: frozenset[str] = frozenset({""}),
    overrides: Mapping[str, Any] = MappingProxyType({}),
    twin: Mapping[str, Any] = MappingProxyType({}),
    outcome: Outcome = Outcome.CURED,
) -> Case:
    """Return a case with bad samples in the batches of some steps of the first epoch.

    `steps` says how many samples of which step's batch are changed in the tensor `key`. The same
    samples come again in the next epochs.
    """
    draw = drawing(name)
    order = replace(task, **overrides).order(seed)
    bad: dict[int, list[int]] = {
        step: sorted(draw.sample(range(len(order.at(step))), count))
        for step, count in steps.items()
    }
    spoiled = [
        order.at(step)[position] for step, positions in bad.items() for position in positions
    ]
    first = min(bad)

    def spoil(data: dict[str, Tensor]) -> None:
        chances = drawing(name + "/change")
        for index in spoiled:
            # A view of one sample, a scalar too.
            change(data[key][index : index + 1], chances)

    return Case(
        name=name,
        task=task,
        seed=seed,
        fault=Fault(data=spoil, overrides=overrides),
        expected=Expected(
            causes=causes,
            phases=phases,
            modules=modules,
            step=first,
            positions=frozenset(bad[first]),
            indices=frozenset(order.at(first)[position] for position in bad[first])
            if task.has_indices
            else None,
            may_add_one=task.architecture in _NORMALISED,
            outcome=outcome,
        ),
        twin=twin,
    )

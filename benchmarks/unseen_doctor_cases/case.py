"""What a case is: a training to build, and the truth about it, written before the doctor saw it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedrounds.diagnosis.values import Cause, StepPhase

Batch = tuple[Tensor, ...]
ComputeLoss = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Tensor]]
Score = Callable[[nn.Module], float]


class Step(NamedTuple):
    """A batch, the numbers of its samples in the data set, and its epoch from 1."""

    batch: Batch
    indices: Tensor
    epoch: int


@dataclass(kw_only=True)
class Training:
    """A training about to begin.

    `score` gives the final metric of a model in evaluation mode: accuracy, R2 or a loss scaled to
    0..1. `before_step` is called with the number of each step, from 1, before it is taken.
    `bad_samples` are the numbers of the samples that are at fault, None where none are.
    """

    model: nn.Module
    optimizer: Optimizer
    compute_loss: ComputeLoss
    steps: Sequence[Step]
    score: Score
    scheduler: LRScheduler | None = None
    clip_norm: float | None = None
    num_classes: int | None = None
    before_step: Callable[[int], None] = lambda number: None
    bad_samples: frozenset[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is at fault; empty sets where nothing is claimed.

    `causes` are the names that fit: more than one where the doctor's list has two names for it.
    """

    kind: str
    becomes_non_finite: bool
    causes: frozenset[Cause]
    phases: frozenset[StepPhase]
    modules: frozenset[str]
    is_curable: bool


@dataclass(frozen=True, kw_only=True)
class PlantedCase:
    """A fault; `build(seed, fault=False)` is its healthy twin."""

    name: str
    story: str
    truth: Truth
    build: Callable[..., Training]


@dataclass(frozen=True, kw_only=True)
class HealthyCase:
    """A training that looks odd and is well."""

    name: str
    story: str
    build: Callable[..., Training]


@dataclass
class Register:
    """The cases by name, filled by the decorators below."""

    planted: dict[str, PlantedCase] = field(default_factory=dict)
    healthy: dict[str, HealthyCase] = field(default_factory=dict)


REGISTER = Register()


def planted(
    kind: str,
    *,
    causes: str,
    phases: str = "",
    modules: str = "",
    is_finite: bool = False,
    is_curable: bool = True,
) -> Callable[[Callable[..., Training]], Callable[..., Training]]:
    """Register a function of (seed, fault) as a case; its docstring is the case's story."""
    truth = Truth(
        kind=kind,
        becomes_non_finite=not is_finite,
        causes=frozenset(Cause(name) for name in causes.split()),
        phases=frozenset(StepPhase(name) for name in phases.split()),
        modules=frozenset(modules.split()),
        is_curable=is_curable,
    )

    def register(build: Callable[..., Training]) -> Callable[..., Training]:
        name = build.__name__
        assert name not in REGISTER.planted, name
        REGISTER.planted[name] = PlantedCase(
            name=name, story=_first_line(build), truth=truth, build=build
        )
        return build

    return register


def healthy(build: Callable[..., Training]) -> Callable[..., Training]:
    """Register a function of the seed as a healthy case; its docstring is the case's story."""
    name = build.__name__
    assert name not in REGISTER.healthy, name
    REGISTER.healthy[name] = HealthyCase(name=name, story=_first_line(build), build=build)
    return build


def _first_line(build: Callable[..., Training]) -> str:
    assert build.__doc__
    return build.__doc__.strip().splitlines()[0].rstrip(".")

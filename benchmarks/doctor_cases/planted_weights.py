"""Faults in the weights that training begins with; and what can't be proven or isn't known."""

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim import Optimizer

from benchmarks.doctor_cases import tasks
from benchmarks.doctor_cases.cases import Case, Expected, Outcome
from benchmarks.doctor_cases.nets import SmallCNN, Wrapped
from benchmarks.doctor_cases.training import Fault, Task
from fedrounds.diagnosis.values import Cause, StepPhase

_INITIAL = frozenset({Cause.BAD_INITIALISATION})
_RECEIVED = frozenset({Cause.RECEIVED_MODEL})
# A weight is bad before the step begins; it shows where it is used first.
_AT_ITS_USE = frozenset({StepPhase.INPUT, StepPhase.FORWARD})
Spoil = Callable[[nn.Module], None]


def initialisations() -> list[Case]:
    """Return the cases of fresh weights that can't be trained. Only a server may draw others."""
    fresh = replace(tasks.SMALL_CNN, fresh_state=lambda: SmallCNN().state_dict())
    rows: list[tuple[str, Task, Spoil]] = [
        ("cnn weights times 30", tasks.CNN, _scaled(30)),
        ("cnn weights times 1000", tasks.CNN, _scaled(1000)),
        ("small cnn weights times 100, fresh ones given", fresh, _scaled(100)),
        ("mlp weights times 300", tasks.MLP, _scaled(300)),
        ("rnn weights times 4", tasks.RNN, _scaled(4)),
        ("regression weights times 1000", tasks.REGRESSION, _scaled(1000)),
        ("transformer weights times 1e5", tasks.TAGGER, _scaled(1e5)),
        ("small cnn a constant everywhere", tasks.SMALL_CNN, _constant(1.0)),
        ("mlp zeros in every layer", tasks.MLP, _constant(0.0)),
        ("small cnn zeros in the hidden layers", fresh, _constant(0.0, "fc1", "conv2")),
        ("cnn dead by its biases", tasks.CNN, _biases(-1e3, "fc1")),
        ("mlp dead by its biases", tasks.MLP, _biases(-1e3, "layers.2")),
        (
            "small cnn dead from the first layer on",
            tasks.SMALL_CNN,
            _biases(-1e3, "conv1", "conv2"),
        ),
        ("mlp memory never written", tasks.MLP, _unwritten("layers.2.weight")),
    ]
    return [
        Case(
            name=f"{name} (initial)",
            task=task,
            seed=seed,
            fault=Fault(weights=spoil),
            expected=Expected(causes=_INITIAL, outcome=Outcome.HALTED),
        )
        for seed, (name, task, spoil) in enumerate(rows, start=600)
    ]


def received_models() -> list[Case]:
    """Return the cases of weights that came from elsewhere and were bad on arrival."""
    finite: list[tuple[str, Task, Spoil]] = [
        ("small cnn times 30", tasks.SMALL_CNN, _scaled(30)),
        ("small cnn times 1000", tasks.SMALL_CNN, _scaled(1000)),
        ("regression times 1e6", tasks.REGRESSION, _scaled(1e6)),
        ("gru one weight of 1e30", tasks.GRU, _entry("head.weight", 1e30)),
        ("small cnn dead by its biases", tasks.SMALL_CNN, _biases(-1e3, "fc1")),
        ("mlp zeros in every layer", tasks.MLP, _constant(0.0)),
    ]
    broken: list[tuple[str, Task, Spoil, str]] = [
        ("cnn nan in one weight", tasks.CNN, _entry("conv2.weight", math.nan), "conv2"),
        ("small cnn inf in one weight", tasks.SMALL_CNN, _entry("fc1.weight", math.inf), "fc1"),
        ("transformer inf bias", tasks.TAGGER, _entry("head.bias", math.inf), "head"),
        (
            "norm mlp nan in a buffer",
            tasks.NORM_MLP,
            _entry("norm1.running_var", math.nan),
            "norm1",
        ),
        (
            "norm mlp inf in a buffer",
            tasks.NORM_MLP,
            _entry("norm2.running_mean", math.inf),
            "norm2",
        ),
    ]
    return [
        *(
            Case(
                name=f"{name} (received)",
                task=_received(task),
                seed=seed,
                fault=Fault(weights=spoil),
                expected=Expected(causes=_RECEIVED, outcome=Outcome.HALTED),
            )
            for seed, (name, task, spoil) in enumerate(finite, start=630)
        ),
        *(
            Case(
                name=f"{name} (received)",
                task=_received(task),
                seed=seed,
                fault=Fault(weights=spoil),
                expected=Expected(
                    causes=_RECEIVED,
                    phases=_AT_ITS_USE,
                    modules=frozenset({"", module}),
                    step=1,
                    outcome=Outcome.HALTED,
                ),
            )
            for seed, (name, task, spoil, module) in enumerate(broken, start=640)
        ),
    ]


def _received(task: Task) -> Task:
    """The same task beginning with a model that has been trained before."""

    def train(model: nn.Module, optimizer: Optimizer) -> None:
        inputs, targets = (tensor[-400:] for tensor in task.load()[0].values())
        for at in range(0, 400, 20):
            optimizer.zero_grad()
            returned: Any = task.loss(model, (inputs[at : at + 20], targets[at : at + 20]))
            returned[0].backward()
            optimizer.step()
        optimizer.zero_grad()
        # An optimizer always starts without history.
        optimizer.state.clear()

    return replace(task, is_initial=False, prepare=train)


def _scaled(factor: float) -> Spoil:
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(factor)

    return spoil


def _constant(value: float, *modules: str) -> Spoil:
    """Return a function that fills the weights and biases of the named modules (none: of all)."""

    def spoil(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if not modules or name.startswith(modules):
                nn.init.constant_(parameter, value)

    return spoil


def _biases(value: float, *modules: str) -> Spoil:
    def spoil(model: nn.Module) -> None:
        for module in modules:
            nn.init.constant_(model.get_parameter(f"{module}.bias"), value)

    return spoil


def _entry(key: str, value: float) -> Spoil:
    def spoil(model: nn.Module) -> None:
        model.state_dict()[key].view(-1)[3] = value

    return spoil


def _unwritten(key: str) -> Spoil:
    """Return a function that leaves random bytes in a weight: numbers of every size, some NaNs."""

    def spoil(model: nn.Module) -> None:
        entry = model.state_dict()[key]
        drawn = torch.Generator().manual_seed(605)
        numbers = torch.randint(-(2**31), 2**31 - 1, entry.shape, generator=drawn)
        entry.copy_(numbers.to(torch.int32).view(torch.float32))

    return spoil


class Cooled(nn.Module):
    """Divides by a temperature that falls from 4 by 1 every so many training steps, to zero."""

    num_steps: Tensor

    def __init__(self, *, every: int, lowest: int) -> None:
        super().__init__()
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.every = every
        self.lowest = lowest

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        if self.training:
            self.num_steps = self.num_steps + 1
        temperature = (4 - self.num_steps // self.every).clamp(min=self.lowest)
        return 4 * x / temperature


class _Broken(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        """Return x as it is."""
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        """Return 0/0."""
        return gradients[0] * math.nan


class BrokenDerivative(nn.Module):
    """A module of somebody's own whose backward pass is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x as it is."""
        result: Tensor = _Broken.apply(x)
        return result


class Noisy(nn.Module):
    """Adds noise that nobody can seed, and every 40 or so steps something much worse."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.num_steps = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        if not self.training:
            return x
        self.num_steps += 1
        noise = (secrets.randbelow(1000) + 1) * 1e-6
        return x / 0 if self.num_steps == self.step else x * (1 + noise)


def unproven() -> list[Case]:
    """Return the cases in which no cause may be claimed."""
    not_again = frozenset({Cause.NOT_REPRODUCIBLE})
    return [
        Case(
            name="mlp weight overwritten from outside",
            task=tasks.MLP,
            seed=660,
            fault=Fault(between=_overwriting(57, "layers.2.weight", math.nan)),
            expected=Expected(causes=not_again, step=57, outcome=Outcome.EITHER),
        ),
        Case(
            name="small cnn weight overwritten from outside",
            task=tasks.SMALL_CNN,
            seed=661,
            fault=Fault(between=_overwriting(101, "conv1.weight", math.inf)),
            expected=Expected(causes=not_again, step=101, outcome=Outcome.EITHER),
        ),
        Case(
            name="mlp noise that can't be seeded",
            task=tasks.MLP,
            seed=662,
            fault=Fault(overrides={"build": lambda: Wrapped(Noisy(70))}),
            expected=Expected(causes=not_again, step=70, outcome=Outcome.EITHER),
        ),
        Case(
            name="mlp a derivative that is always nan",
            task=tasks.MLP,
            seed=663,
            fault=Fault(overrides={"build": lambda: Wrapped(BrokenDerivative())}),
            expected=Expected(
                causes=frozenset({Cause.UNKNOWN}),
                phases=frozenset({StepPhase.BACKWARD}),
                modules=frozenset({"middle"}),
                step=1,
                outcome=Outcome.HALTED,
            ),
        ),
        Case(
            name="mlp a temperature that reaches zero",
            task=tasks.MLP,
            seed=664,
            fault=Fault(overrides={"build": lambda: Wrapped(Cooled(every=15, lowest=0))}),
            expected=Expected(
                # The model's own schedule is at fault, for which there is no name; a quotient that
                # isn't defined is one, if the guarded loss includes the model.
                causes=frozenset({Cause.UNKNOWN, Cause.LOSS_FUNCTION}),
                phases=frozenset({StepPhase.FORWARD}),
                modules=frozenset({"middle"}),
                step=60,
                outcome=Outcome.EITHER,
            ),
            twin={"build": lambda: Wrapped(Cooled(every=15, lowest=1))},
        ),
    ]


def _overwriting(step: int, key: str, value: float) -> Callable[[int, nn.Module], None]:
    def overwrite(now: int, model: nn.Module) -> None:
        if now == step:
            model.state_dict()[key].view(-1)[5] = value

    return overwrite

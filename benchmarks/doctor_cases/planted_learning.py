"""Faults in how it is learned: rates that are too high and gradients that explode."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import Case, Expected, Outcome, drawing, log_uniform
from benchmarks.doctor_cases.nets import Wrapped
from benchmarks.doctor_cases.training import Batch, Fault, Task
from fedrounds.diagnosis.values import Cause

_RATE = frozenset({Cause.LEARNING_RATE})
_EXPLODING = frozenset({Cause.EXPLODING_GRADIENT})
# Where, as `--check` measures, a lower rate and clipping both lead to the healthy twin's score,
# nobody can say which of the two was missing.
_ALSO = {"mlp sgd at 1 with momentum": _EXPLODING}


def learning_rates() -> list[Case]:
    """Return the cases of rates too high: at once, slowly, into a corner, or from a schedule."""
    rows: list[tuple[str, Task, Callable[[nn.Module], Optimizer]]] = [
        ("cnn sgd at 1 with momentum", tasks.CNN, tasks.sgd(1.0)),
        ("small cnn sgd at 20", tasks.SMALL_CNN, tasks.sgd(20.0, 0.0)),
        ("small cnn sgd at 0.7 with momentum", tasks.SMALL_CNN, tasks.sgd(0.7)),
        ("small cnn adam at 1", tasks.SMALL_CNN, tasks.adam(1.0)),
        ("mlp sgd at 5", tasks.MLP, tasks.sgd(5.0, 0.0)),
        ("mlp sgd at 1 with momentum", tasks.MLP, tasks.sgd(1.0)),
        ("gru adam at 3", tasks.GRU, tasks.adam(3.0)),
        ("transformer adam at 1", tasks.TAGGER, tasks.adam(1.0)),
        ("regression sgd at 0.4, slowly", tasks.REGRESSION, tasks.sgd(0.4)),
        ("regression sgd at 10", tasks.REGRESSION, tasks.sgd(10.0, 0.0)),
        ("rnn clipped, sgd at 5", tasks.RNN, tasks.sgd(5.0)),
        ("autoencoder adam at 2", tasks.AUTOENCODER, tasks.adam(2.0)),
        ("siamese sgd at 3", tasks.TWINS, tasks.sgd(3.0, 0.0)),
    ]
    cases = [
        Case(
            name=name,
            task=task,
            seed=seed,
            fault=Fault(overrides={"optimizer": optimizer}),
            expected=Expected(causes=_RATE | _ALSO.get(name, frozenset())),
        )
        for seed, (name, task, optimizer) in enumerate(rows, start=500)
    ]
    cases += [
        Case(
            name=name,
            task=task,
            seed=seed,
            fault=Fault(overrides={"scheduler": _rising(factor)}),
            # It goes on rising, whatever it is divided by.
            expected=Expected(causes=_RATE, outcome=Outcome.CURED_OR_HALTED),
        )
        for seed, (name, task, factor) in enumerate(
            (
                ("mlp rate that doubles every ten steps", tasks.MLP, 2 ** (1 / 10)),
                ("small cnn rate that rises to a thousandfold", tasks.SMALL_CNN, 1000 ** (1 / 200)),
            ),
            start=520,
        )
    ]
    return cases


def _rising(factor: float) -> Callable[[Optimizer], LambdaLR]:
    return lambda optimizer: LambdaLR(optimizer, lambda step: factor**step)


class _Steepened(torch.autograd.Function):
    """The identity, whose gradient comes back multiplied."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: Tensor) -> Tensor:
        """Return x as it is."""
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401  no declared type has saved_tensors
        *gradients: Tensor,
    ) -> tuple[Tensor, None]:
        """Return the gradient times the factor."""
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


class Spike(nn.Module):
    """The identity; every so many training steps its gradient is multiplied."""

    num_steps: Tensor

    def __init__(self, factor: float, steps: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.factor = factor
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Return x as it is."""
        if not self.training:
            return x
        # Not in place: a module's count of steps is part of its state, as BatchNorm's is.
        self.num_steps = self.num_steps + 1
        is_steep = self.num_steps.item() in self.steps
        result: Tensor = _Steepened.apply(x, torch.tensor(self.factor if is_steep else 1.0))
        return result


def exploding_gradients() -> list[Case]:
    """Return the cases of gradients that explode at a rate that is sane otherwise."""
    cases = []
    for seed, length in ((540, 60), (541, 80), (542, 100)):
        name = f"rnn over {length} steps without clipping"
        task = replace(tasks.RNN, load=functools.partial(data.series, length), num_examples=960)
        cases.append(
            Case(
                name=name,
                task=task,
                seed=seed,
                fault=Fault(overrides={"clip_norm": None}),
                # A hundredth of the rate leads to the same score too.
                expected=Expected(causes=_EXPLODING | _RATE),
            )
        )
    for seed, (low, high, steps) in enumerate(
        ((1e5, 1e6, (44,)), (1e8, 1e12, (90,)), (1e6, 1e8, (12, 50, 88, 126))), start=550
    ):
        name = f"mlp gradient spike at step {steps[0]} of {len(steps)}"
        factor = log_uniform(drawing(name), low, high)
        task = replace(tasks.MLP, build=_spiky(1.0, steps))
        cases.append(
            Case(
                name=name,
                task=task,
                seed=seed,
                fault=Fault(overrides={"build": _spiky(factor, steps)}),
                expected=Expected(causes=_EXPLODING, step=steps[0]),
            )
        )
    cases.append(
        Case(
            name="small cnn gradient spike",
            task=tasks.SMALL_CNN,
            seed=560,
            fault=Fault(overrides={"build": _spiky_cnn}),
            expected=Expected(causes=_EXPLODING, step=120),
        )
    )
    for seed, scale in ((565, 2.0), (566, 3.0)):
        steep = replace(
            tasks.REGRESSION,
            load=functools.partial(data.curve, scale),
            loss=_fourth_power,
            clip_norm=1.0,
        )
        cases.append(
            Case(
                name=f"regression fourth power of errors of {scale:g}",
                task=steep,
                seed=seed,
                fault=Fault(overrides={"clip_norm": None}),
                expected=Expected(causes=_EXPLODING),
            )
        )
    return cases


def _spiky(factor: float, steps: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Wrapped(Spike(factor, steps))


def _spiky_cnn() -> nn.Module:
    model = tasks.SMALL_CNN.build()
    return nn.Sequential(model, Spike(1e7, (120,)))


def _fourth_power(model: nn.Module, batch: Batch) -> tasks.Outcome:
    inputs, targets = batch
    outputs = model(inputs)
    return (outputs - targets).pow(4).mean(), outputs

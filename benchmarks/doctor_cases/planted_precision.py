"""Faults of too few bits, and of an optimizer's own state."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import Case, Expected, Outcome
from benchmarks.doctor_cases.nets import PlainMLP, Wrapped
from benchmarks.doctor_cases.training import Batch, Fault, Task
from fedrounds.diagnosis.values import Cause, StepPhase

_LOSS = frozenset({StepPhase.LOSS})
_BACKWARD = frozenset({StepPhase.BACKWARD})
_FORWARD = frozenset({StepPhase.FORWARD})
_OPTIMIZER = frozenset({StepPhase.OPTIMIZER})
_PRECISION = frozenset({Cause.PRECISION})
_ANYWHERE: frozenset[str] = frozenset()


class RootMeanSquare(nn.Module):
    """Divides each row by the root of its mean square, computed in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


class OnePassNorm(nn.Module):
    """Takes the variance as the mean square less the squared mean, as fast kernels once did."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        x = x + 40
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) / variance.sqrt()


class MaskedAttention(nn.Module):
    """Softmax over a score for each place, some of which are masked by -1e9."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        is_masked = x < -2
        return x + torch.softmax(x.masked_fill(is_masked, -1e9), -1)


class Exponentials(nn.Module):
    """Softmax without subtracting the largest score first."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        powers = torch.exp(self.factor * x)
        return x + powers / powers.sum(-1, keepdim=True)


def precision() -> list[Case]:
    """Return the cases of numbers that float32 holds and fewer bits don't."""
    half = torch.float16
    return [
        _narrow(
            "fp16 mean square",
            RootMeanSquare,
            half,
            150.0,
            frozenset({StepPhase.FORWARD, StepPhase.BACKWARD}),
        ),
        _narrow("bf16 one-pass variance", OnePassNorm, torch.bfloat16, 1.0, _FORWARD),
        _narrow("fp16 mask of -1e9", MaskedAttention, half, 1.0, _FORWARD),
        _narrow(
            "fp16 exponentials",
            lambda: Exponentials(3.0),
            half,
            1.0,
            _FORWARD,
            # Their sum is beyond fp16; and a softmax is not to be computed that way.
            causes=frozenset({Cause.PRECISION, Cause.LOSS_FUNCTION}),
        ),
        _autocast("fp16 autocast overflow", half, 8000.0),
        _scaled_gradient("fp16 gradient beyond a loss scale of 2^24", 24),
        _scaled_gradient("fp16 gradient beyond a loss scale of 2^19", 19),
        _half_adam(),
        _half_millimetres(),
    ]


def _narrow(
    name: str,
    middle: Callable[[], nn.Module],
    dtype: torch.dtype,
    scale: float,
    phases: frozenset[StepPhase],
    *,
    causes: frozenset[Cause] = _PRECISION,
) -> Case:
    """A whole model in fewer bits; the twin is the same in float32."""
    task = replace(
        tasks.MLP,
        load=lambda: data.blobs(5, scale),
        build=lambda: Wrapped(middle()),
    )
    return Case(
        name=f"mlp {name}",
        task=task,
        seed=400,
        fault=Fault(overrides={"build": lambda: Wrapped(middle()).to(dtype)}),
        expected=Expected(causes=causes, phases=phases, modules=frozenset({"middle"})),
    )


def _autocast(name: str, dtype: torch.dtype, scale: float) -> Case:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        with torch.autocast("cpu", dtype=dtype):
            return tasks.cross_entropy(model, batch)

    task = replace(
        tasks.MLP,
        load=lambda: data.blobs(5, scale),
        build=lambda: Wrapped(nn.LayerNorm(32)),
        optimizer=tasks.adam(0.003),
    )
    return Case(
        name=f"mlp {name}",
        task=task,
        seed=401,
        fault=Fault(overrides={"loss": loss}),
        expected=Expected(causes=_PRECISION, phases=_FORWARD, modules=frozenset({"first"})),
    )


def _scaled_gradient(name: str, power: int) -> Case:
    """A loss scaled up against underflow, by too much, and the rate scaled down by the same."""

    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        value, outputs = tasks.cross_entropy(model, batch)
        return value * 2.0**power, outputs

    task = replace(tasks.MLP, loss=loss, optimizer=tasks.sgd(0.02 / 2.0**power))
    return Case(
        name=f"mlp {name}",
        task=task,
        seed=402,
        fault=Fault(overrides={"build": lambda: PlainMLP().half()}),
        expected=Expected(causes=_PRECISION, phases=_BACKWARD),
    )


def _half_adam() -> Case:
    """Adam's eps of 1e-8 and squares of small gradients are zero in fp16: it divides by zero."""
    task = replace(tasks.MLP, optimizer=tasks.adam(0.003))
    return Case(
        name="mlp fp16 adam with an eps that rounds to zero",
        task=task,
        seed=403,
        fault=Fault(overrides={"build": lambda: PlainMLP().half()}),
        expected=Expected(causes=_PRECISION, phases=_OPTIMIZER, step=1),
    )


def _half_millimetres() -> Case:
    """Errors in thousandths, squared: beyond fp16 from an error of a quarter on."""

    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        inputs, targets = batch
        outputs = model(inputs)
        thousandths = 1000 * (outputs - targets.to(outputs.dtype))
        return thousandths.square().mean() * 1e-6, outputs

    return Case(
        name="regression fp16 squares of thousandths",
        task=replace(tasks.REGRESSION, loss=loss),
        seed=404,
        fault=Fault(overrides={"build": lambda: PlainMLP(num_outputs=1).half()}),
        expected=Expected(causes=_PRECISION, phases=_LOSS, modules=frozenset({""}), step=1),
    )


def optimizer_states() -> list[Case]:
    """Return the cases of an optimizer that begins with a bad history, or divides by 0."""
    adamw = replace(tasks.TWINS, optimizer=_adamw)
    rms = replace(tasks.MLP, optimizer=_rmsprop)
    rows: list[tuple[str, Task, str, float, str | None]] = [
        ("small cnn momentum of 1e30", tasks.SMALL_CNN, "momentum_buffer", 1e30, None),
        (
            "small cnn momentum of 1e6 in one tensor",
            tasks.SMALL_CNN,
            "momentum_buffer",
            1e6,
            "conv2.weight",
        ),
        ("norm mlp nan momentum", tasks.NORM_MLP, "momentum_buffer", math.nan, "fc2.weight"),
        ("gru negative second moment", tasks.GRU, "exp_avg_sq", -1e-3, "head.weight"),
        ("transformer infinite second moment", tasks.TAGGER, "exp_avg_sq", math.inf, None),
        ("table nan second moment", tasks.TABLE, "exp_avg_sq", math.nan, "fc1.weight"),
        ("autoencoder first moment of 1e20", tasks.AUTOENCODER, "exp_avg", 1e20, None),
        ("siamese first moment of 1e8", adamw, "exp_avg", 1e8, "encoder.0.weight"),
        ("mlp negative mean square", rms, "square_avg", -1.0, "layers.2.weight"),
    ]
    cases = [
        Case(
            name=name,
            task=task,
            seed=seed,
            fault=Fault(state=_broken_state(key, value, tensor)),
            expected=Expected(
                causes=frozenset({Cause.OPTIMIZER_STATE}),
                # A moment that was loaded is bad before the first step; what it does shows in the
                # optimizer's step, or where it is finite, in the step after that.
                phases=_OPTIMIZER if not math.isfinite(value) or value < 0 else frozenset(),
                modules=frozenset({"", (tensor or "").rpartition(".")[0]})
                if tensor is not None and value < 0
                else _ANYWHERE,
            ),
        )
        for seed, (name, task, key, value, tensor) in enumerate(rows, start=420)
    ]
    cases += [
        Case(
            name=name,
            task=task,
            seed=440,
            fault=Fault(overrides={"optimizer": tasks.adam(lr, eps=0.0)}),
            expected=Expected(
                causes=frozenset({Cause.OPTIMIZER_STATE}),
                phases=_OPTIMIZER,
                modules=frozenset({"", module}),
                step=1,
                # It divides by zero with a fresh history too.
                outcome=Outcome.EITHER,
            ),
        )
        for name, task, lr, module in (
            ("gru adam with eps 0 and unused words", tasks.GRU, 0.01, "embedding"),
            ("transformer adam with eps 0 and unused words", tasks.TAGGER, 0.005, "words"),
        )
    ]
    return cases


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.003, amsgrad=True)


def _rmsprop(model: nn.Module) -> Optimizer:
    return RMSprop(model.parameters(), lr=0.002)


def _broken_state(
    key: str, value: float, tensor: str | None
) -> Callable[[nn.Module, Optimizer], None]:
    """Return a function that loads a state of 20 steps with a bad entry, in a tensor or in all."""

    def load(model: nn.Module, optimizer: Optimizer) -> None:
        for name, parameter in model.named_parameters():
            state: dict[str, Tensor] = {}
            if isinstance(optimizer, SGD):
                state["momentum_buffer"] = torch.zeros_like(parameter)
            elif isinstance(optimizer, RMSprop):
                state["step"] = torch.tensor(20.0)
                state["square_avg"] = torch.full_like(parameter, 1e-4)
            elif isinstance(optimizer, Adam):
                state["step"] = torch.tensor(20.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.full_like(parameter, 1e-4)
                if optimizer.param_groups[0]["amsgrad"]:
                    state["max_exp_avg_sq"] = torch.full_like(parameter, 1e-4)
            if tensor in (None, name):
                state[key].fill_(value)
            optimizer.state[parameter] = state

    return load

"""Healthy trainings that are odd in how they step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
)

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import HealthyRow, row
from benchmarks.doctor_cases.healthy_data import (
    labels_only,
    labels_shuffled,
)
from benchmarks.doctor_cases.nets import PlainMLP, SmallCNN
from benchmarks.doctor_cases.training import Batch


def small_batches() -> list[HealthyRow]:
    """Return trainings with few samples a step."""
    rows: list[HealthyRow] = []
    for size in (1, 2, 3, 4):
        rows += [
            row(
                f"small cnn batches of {size}",
                tasks.SMALL_CNN,
                0.8,
                batch_size=size,
                num_examples=300 * size,
                epochs=1,
                optimizer=tasks.sgd(0.003),
            ),
            row(
                f"mlp batches of {size}, adam",
                tasks.MLP,
                0.9,
                batch_size=size,
                num_examples=400 * size,
                epochs=2,
                optimizer=tasks.adam(0.002),
            ),
        ]
    return [
        *rows,
        row(
            "norm mlp batches of 2",
            tasks.NORM_MLP,
            0.8,
            batch_size=2,
            num_examples=800,
            epochs=1,
            optimizer=tasks.sgd(0.005),
        ),
        row(
            "regression batches of 1",
            tasks.REGRESSION,
            0.8,
            batch_size=1,
            num_examples=800,
            epochs=1,
            optimizer=tasks.sgd(0.002),
        ),
        row("table last batch of one", tasks.TABLE, 0.97, num_examples=1569, epochs=2),
    ]


def high_rates() -> list[HealthyRow]:
    """Return trainings with high but sane rates."""
    return [
        row("cnn sgd at 0.1", tasks.CNN, 0.97, optimizer=tasks.sgd(0.1, 0.0)),
        row(
            "small cnn sgd at 0.05 with momentum", tasks.SMALL_CNN, 0.95, optimizer=tasks.sgd(0.05)
        ),
        row("small cnn sgd at 0.5", tasks.SMALL_CNN, 0.95, optimizer=tasks.sgd(0.5, 0.0)),
        row("norm mlp sgd at 1", tasks.NORM_MLP, 0.95, optimizer=tasks.sgd(1.0, 0.0)),
        row("norm mlp sgd at 0.3 with momentum", tasks.NORM_MLP, 0.95, optimizer=tasks.sgd(0.3)),
        row("mlp sgd at 0.2", tasks.MLP, 0.95, optimizer=tasks.sgd(0.2, 0.0)),
        row("gru adam at 0.05", tasks.GRU, 0.9, optimizer=tasks.adam(0.05)),
        row("gru sgd at 1", tasks.GRU, 0.5, optimizer=tasks.sgd(1.0, 0.0)),
        row("transformer adam at 0.015", tasks.TAGGER, 0.8, optimizer=tasks.adam(0.015), epochs=3),
        row("regression sgd at 0.1", tasks.REGRESSION, 0.9, optimizer=tasks.sgd(0.1)),
        row("rnn clipped, sgd at 0.05", tasks.RNN, 0.9, optimizer=tasks.sgd(0.05)),
    ]


def _autocast(dtype: torch.dtype) -> Callable[[nn.Module, Batch], tasks.Outcome]:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        with torch.autocast("cpu", dtype=dtype):
            return tasks.cross_entropy(model, batch)

    return loss


def _scaled_loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
    value, outputs = tasks.cross_entropy(model, batch)
    return 256 * value, outputs


def few_bits() -> list[HealthyRow]:
    """Return trainings with fewer bits, or more."""
    half, brain = torch.float16, torch.bfloat16
    return [
        row("small cnn bf16", tasks.SMALL_CNN, 0.9, build=lambda: SmallCNN().to(brain)),
        row("cnn bf16 autocast", tasks.CNN, 0.9, loss=_autocast(brain), epochs=1),
        row("mlp fp16 autocast", tasks.MLP, 0.95, loss=_autocast(half)),
        row("mlp fp16", tasks.MLP, 0.9, build=lambda: PlainMLP().to(half)),
        row("small cnn fp16", tasks.SMALL_CNN, 0.5, build=lambda: SmallCNN().to(half), epochs=1),
        row(
            "mlp fp16 with a loss scale of 256",
            tasks.MLP,
            0.9,
            build=lambda: PlainMLP().to(half),
            loss=_scaled_loss,
            optimizer=tasks.sgd(0.02 / 256),
        ),
        row(
            "mlp bf16 adam",
            tasks.MLP,
            0.9,
            build=lambda: PlainMLP().to(brain),
            optimizer=tasks.adam(0.003),
        ),
        row("mlp float64", tasks.MLP, 0.95, build=lambda: PlainMLP().double()),
    ]


def _cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=200)


def _restarts(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingWarmRestarts(optimizer, T_0=40, eta_min=1e-5)


def _warm_up(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: min(1.0, step / 50))


def _one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=200)


def schedules() -> list[HealthyRow]:
    """Return trainings with rates that change."""
    return [
        row("mlp warm restarts", tasks.MLP, 0.95, scheduler=_restarts, optimizer=tasks.sgd(0.05)),
        row(
            "small cnn warm restarts",
            tasks.SMALL_CNN,
            0.9,
            scheduler=_restarts,
            optimizer=tasks.sgd(0.05),
        ),
        row("mlp warming up from a rate of zero", tasks.MLP, 0.95, scheduler=_warm_up),
        row("norm mlp down to a rate of zero", tasks.NORM_MLP, 0.95, scheduler=_cosine),
        row("mlp one cycle", tasks.MLP, 0.95, scheduler=_one_cycle, optimizer=tasks.sgd(0.1)),
    ]


def _frozen(build: Callable[[], nn.Module], *learning: str) -> Callable[[], nn.Module]:
    """Return a function that builds the same model with all but some parameters frozen."""

    def freeze() -> nn.Module:
        model = build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(learning))
        return model

    return freeze


class HalfUsed(PlainMLP):
    """Has a branch that isn't used, and a branch that is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(data.NUM_FEATURES, 5)
        self.silenced = nn.Linear(data.NUM_FEATURES, 5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 5] of rows [n, 12]."""
        logits: torch.Tensor = super().forward(rows) + 0 * self.silenced(rows)
        return logits


def _learning_only(lr: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=lr,
        momentum=0.9,
    )


def partly_frozen() -> list[HealthyRow]:
    """Return trainings with weights that get no gradient."""
    return [
        row(
            "small cnn all but the head frozen",
            tasks.SMALL_CNN,
            0.3,
            build=_frozen(SmallCNN, "fc2"),
            optimizer=_learning_only(0.02),
        ),
        row(
            "mlp only the last bias learns",
            tasks.MLP,
            0.0,
            build=_frozen(PlainMLP, "layers.4.bias"),
            optimizer=_learning_only(0.02),
        ),
        row(
            "mlp frozen, but given to the optimizer",
            tasks.MLP,
            0.8,
            build=_frozen(PlainMLP, "layers.2", "layers.4"),
        ),
        row("mlp with branches that get no gradient", tasks.MLP, 0.9, build=HalfUsed),
        row("gru embeddings that are never used", tasks.GRU, 0.5, epochs=1),
    ]


def _before(num_steps: int, *, keeps_state: bool) -> Callable[[nn.Module, Optimizer], None]:
    """Return a function that trains a model on the last samples before the watched training."""

    def train(model: nn.Module, optimizer: Optimizer) -> None:
        train_data, _ = data.blobs()
        rows, labels = train_data["rows"][-320:], train_data["labels"][-320:]
        for step in range(num_steps):
            at = 32 * (step % 10)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows[at : at + 32]), labels[at : at + 32])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            optimizer.step()
        optimizer.zero_grad()
        if not keeps_state:
            optimizer.state.clear()

    return train


def resumed() -> list[HealthyRow]:
    """Return trainings with something behind them."""
    resumed: dict[str, Any] = {"is_initial": False, "epochs": 2}
    return [
        row(
            "mlp resumed adam",
            tasks.MLP,
            0.95,
            optimizer=tasks.adam(0.003),
            prepare=_before(150, keeps_state=True),
            **resumed,
        ),
        row(
            "mlp resumed momentum",
            tasks.MLP,
            0.95,
            prepare=_before(150, keeps_state=True),
            **resumed,
        ),
        row(
            "norm mlp received, fully trained",
            tasks.NORM_MLP,
            0.95,
            prepare=_before(200, keeps_state=False),
            **resumed,
        ),
        row(
            "mlp received, one class here",
            tasks.MLP,
            0.0,
            load=labels_only(data.blobs, 1),
            num_examples=320,
            prepare=_before(200, keeps_state=False),
            **resumed,
        ),
        row(
            "mlp received, other labels here",
            tasks.MLP,
            0.0,
            load=labels_shuffled(data.blobs, 1.0),
            prepare=_before(200, keeps_state=False),
            **resumed,
        ),
    ]

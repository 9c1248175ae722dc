"""Healthy trainings that are odd in what they learn."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import HealthyRow, row
from benchmarks.doctor_cases.healthy_data import (
    heavy_tails,
    labels_only,
    labels_shuffled,
    large_rows,
    mostly_one_class,
    perfectly_fitted,
    several_labels,
    sorted_by_class,
    sparse_rows,
    text_windows,
    tiny,
)
from benchmarks.doctor_cases.nets import PlainMLP, Wrapped
from benchmarks.doctor_cases.training import Batch, Data, Task
from fedrounds.tasks.models import CharGRU


def one_sided_clients() -> list[HealthyRow]:
    """Return trainings with labels that are far from even."""
    return [
        row(
            "cnn a client with one class",
            tasks.CNN,
            0.0,
            load=labels_only(tasks.CNN.load, 1),
            num_examples=640,
        ),
        row(
            "small cnn a client with one class",
            tasks.SMALL_CNN,
            0.0,
            load=labels_only(tasks.SMALL_CNN.load, 4),
            num_examples=640,
        ),
        row(
            "norm mlp a client with one class",
            tasks.NORM_MLP,
            0.0,
            load=labels_only(data.blobs, 2),
            num_examples=320,
        ),
        row(
            "gru a client with one class",
            tasks.GRU,
            0.0,
            load=labels_only(data.sentences, 3),
            num_examples=320,
        ),
        row(
            "small cnn 95 to 5",
            tasks.SMALL_CNN,
            0.5,
            load=mostly_one_class(tasks.SMALL_CNN.load, 1, 0.95),
            num_examples=960,
            epochs=6,
        ),
        row(
            "cnn 90 to 10",
            tasks.CNN,
            0.0,
            load=mostly_one_class(tasks.CNN.load, 0, 0.9),
            num_examples=960,
        ),
        row(
            "mlp 95 to 5 at a low rate",
            tasks.MLP,
            0.0,
            load=mostly_one_class(data.blobs, 0, 0.95),
            num_examples=960,
            optimizer=tasks.sgd(0.001),
        ),
        row(
            "mlp 99 to 1",
            tasks.MLP,
            0.0,
            load=mostly_one_class(data.blobs, 3, 0.99),
            num_examples=960,
        ),
        row(
            "gru 95 to 5",
            tasks.GRU,
            0.0,
            load=mostly_one_class(data.sentences, 2, 0.95),
            num_examples=640,
        ),
        row(
            "mlp sorted by class",
            tasks.MLP,
            0.0,
            load=sorted_by_class(data.blobs),
            num_examples=1600,
            is_shuffled=False,
        ),
        row(
            "small cnn sorted by class",
            tasks.SMALL_CNN,
            0.0,
            load=sorted_by_class(tasks.SMALL_CNN.load),
            num_examples=960,
            is_shuffled=False,
            epochs=2,
            optimizer=tasks.sgd(0.01),
        ),
    ]


def little_data() -> list[HealthyRow]:
    """Return trainings with next to nothing left to learn."""
    return [
        row(
            "mlp two samples",
            tasks.MLP,
            0.0,
            load=tiny(data.blobs, 2),
            num_examples=2,
            batch_size=2,
            epochs=200,
        ),
        row(
            "mlp ten samples, learned by heart",
            tasks.MLP,
            0.0,
            load=tiny(data.blobs, 10),
            num_examples=10,
            batch_size=5,
            epochs=150,
            optimizer=tasks.sgd(0.05),
        ),
        row(
            "small cnn twenty samples",
            tasks.SMALL_CNN,
            0.5,
            load=tiny(tasks.SMALL_CNN.load, 20),
            num_examples=20,
            batch_size=7,
            epochs=80,
        ),
        row(
            "regression fitted perfectly",
            tasks.REGRESSION,
            0.0,
            load=perfectly_fitted,
            num_examples=640,
            epochs=3,
            build=functools.partial(_zero_start, 1),
        ),
        row("mlp hinge loss exactly zero", tasks.MLP, 0.95, loss=_hinge, epochs=6),
        row("siamese loss often exactly zero", tasks.TWINS, 0.95, epochs=6),
        row(
            "mlp one batch again and again",
            tasks.MLP,
            0.0,
            load=tiny(data.blobs, 32),
            num_examples=32,
            epochs=250,
            optimizer=tasks.adam(0.01),
        ),
    ]


def _zero_start(num_outputs: int) -> nn.Module:
    model = PlainMLP(num_outputs=num_outputs)
    nn.init.zeros_(model.get_parameter("layers.4.weight"))
    nn.init.zeros_(model.get_parameter("layers.4.bias"))
    return model


def _hinge(model: nn.Module, batch: Batch) -> tasks.Outcome:
    inputs, labels = batch
    outputs = model(inputs)
    return F.multi_margin_loss(outputs, labels), outputs


def slow_and_noisy() -> list[HealthyRow]:
    """Return trainings with next to nothing learned, or much noise."""
    return [
        row("cnn a rate of 1e-6", tasks.CNN, 0.0, optimizer=tasks.sgd(1e-6), epochs=1),
        row("small cnn a rate of 1e-4", tasks.SMALL_CNN, 0.0, optimizer=tasks.sgd(1e-4, 0.0)),
        row("mlp adam at 1e-6", tasks.MLP, 0.0, optimizer=tasks.adam(1e-6)),
        row("transformer a rate of 1e-4", tasks.TAGGER, 0.0, optimizer=tasks.sgd(1e-4), epochs=2),
        row(
            "small cnn half the labels at random",
            tasks.SMALL_CNN,
            0.5,
            load=labels_shuffled(tasks.SMALL_CNN.load, 0.5),
        ),
        row("mlp all labels at random", tasks.MLP, 0.0, load=labels_shuffled(data.blobs, 1.0)),
        row(
            "mlp spiky losses of single samples",
            tasks.MLP,
            0.5,
            load=labels_shuffled(data.blobs, 0.03),
            batch_size=1,
            num_examples=900,
            epochs=1,
            optimizer=tasks.sgd(0.01, 0.5),
        ),
        row(
            "small cnn spiky losses of single samples",
            tasks.SMALL_CNN,
            0.5,
            load=labels_shuffled(tasks.SMALL_CNN.load, 0.02),
            batch_size=1,
            num_examples=700,
            epochs=1,
            optimizer=tasks.sgd(0.005, 0.5),
        ),
        row("mlp dropout of a half", tasks.MLP, 0.9, build=lambda: Wrapped(nn.Dropout(0.5))),
        row("mlp dropout of nine tenths", tasks.MLP, 0.2, build=lambda: Wrapped(nn.Dropout(0.9))),
        row("chargru mostly blanks at first", _language_task(), 0.0),
    ]


def _language_task() -> Task:
    return Task(
        architecture="CharGRU",
        load=text_windows,
        build=functools.partial(CharGRU, 30),
        loss=tasks.cross_entropy,
        optimizer=tasks.sgd(0.05),
        score=tasks.accuracy,
        num_examples=320,
        batch_size=16,
        epochs=2,
        num_classes=30,
    )


def _loss_only(model: nn.Module, batch: Batch) -> torch.Tensor:
    return tasks.cross_entropy(model, batch)[0]


def _gaussian(model: nn.Module, batch: Batch) -> tasks.Outcome:
    """A negative log-likelihood, which falls below zero."""
    inputs, targets = batch
    outputs = model(inputs)
    mean, log_variance = outputs[:, :1], outputs[:, 1:].clamp(-8, 8)
    value = 0.5 * (log_variance + (mean - targets).square() * torch.exp(-log_variance))
    return value.mean(), mean


def _mean_explained(model: nn.Module, test: Data) -> float:
    mean = model(test["rows"])[:, :1]
    missed: torch.Tensor = (mean - test["targets"]).square().mean() / test["targets"].var()
    return max(0.0, 1 - missed.item())


def _multi_label(model: nn.Module, batch: Batch) -> tasks.Outcome:
    inputs, wanted = batch
    outputs = model(inputs)
    return F.binary_cross_entropy_with_logits(outputs, wanted), outputs


def _labels_right(model: nn.Module, test: Data) -> float:
    is_right: torch.Tensor = (model(test["rows"]) > 0) == (test["wanted"] > 0.5)
    return is_right.float().mean().item()


def odd_losses() -> list[HealthyRow]:
    """Return trainings with losses of other kinds."""
    return [
        row("mlp loss without outputs", tasks.MLP, 0.95, loss=_loss_only),
        row(
            "regression likelihood below zero",
            tasks.REGRESSION,
            0.8,
            build=functools.partial(PlainMLP, num_outputs=2),
            loss=_gaussian,
            score=_mean_explained,
            optimizer=tasks.adam(0.005),
        ),
        row(
            "mlp several rare labels at once",
            tasks.MLP,
            0.9,
            load=several_labels,
            loss=_multi_label,
            score=_labels_right,
            num_classes=None,
        ),
        row("autoencoder images alone", tasks.AUTOENCODER, 0.9, epochs=2),
        row("transformer padding among the tags", tasks.TAGGER, 0.3, epochs=2),
        row("rnn clipped all the time", tasks.RNN, 0.5, clip_norm=0.05),
    ]


def odd_inputs() -> list[HealthyRow]:
    """Return trainings with numbers of other sizes."""
    return [
        row(
            "regression targets of a million",
            tasks.REGRESSION,
            0.0,
            load=functools.partial(data.curve, 1e6),
            optimizer=tasks.adam(0.01),
        ),
        row(
            "regression targets of a thousand, small rate",
            tasks.REGRESSION,
            0.0,
            load=functools.partial(data.curve, 1e3),
            optimizer=tasks.sgd(1e-7),
        ),
        row(
            "table columns of a million",
            tasks.TABLE,
            0.95,
            load=functools.partial(data.blobs, 5, 1e6),
        ),
        row("norm mlp heavy-tailed rows", tasks.NORM_MLP, 0.3, load=heavy_tails),
        row("mlp heavy-tailed rows", tasks.MLP, 0.3, load=heavy_tails, optimizer=tasks.adam(0.002)),
        row("mlp mostly zeros", tasks.MLP, 0.5, load=sparse_rows),
        row(
            "mlp bytes from 0 to 255", tasks.MLP, 0.8, load=large_rows, optimizer=tasks.adam(0.001)
        ),
    ]

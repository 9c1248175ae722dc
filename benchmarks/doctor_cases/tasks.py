"""The sane trainings into which faults are planted, each learned well in under a second."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.doctor_cases import data
from benchmarks.doctor_cases.nets import (
    Autoencoder,
    NormMLP,
    PlainMLP,
    SentenceGRU,
    SeriesRNN,
    SmallCNN,
    Tagger,
    Twins,
)
from benchmarks.doctor_cases.training import Batch, Data, Task
from fedrounds.tasks.models import SimpleCNN, TabularMLP

Outcome = tuple[Tensor, Tensor]
"""A loss and the outputs it was made of."""


def cross_entropy(model: nn.Module, batch: Batch) -> Outcome:
    """Return the loss of (inputs, labels), in float32 whatever the model computes in."""
    inputs, labels = batch
    outputs = model(inputs)
    return F.cross_entropy(outputs.float(), labels), outputs


def squared_error(model: nn.Module, batch: Batch) -> Outcome:
    """Return the mean squared error of (inputs, targets)."""
    inputs, targets = batch
    outputs = model(inputs)
    return F.mse_loss(outputs, targets), outputs


def tag_loss(model: nn.Module, batch: Batch) -> Outcome:
    """Return the mean over all words that have a tag."""
    words, tags = batch
    outputs = model(words)
    return F.cross_entropy(outputs, tags, ignore_index=data.PADDING), outputs


def pixel_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Return the cross-entropy of each pixel; no outputs."""
    return F.binary_cross_entropy_with_logits(model(images), images)


def contrastive_loss(model: nn.Module, batch: Data) -> Tensor:
    """Return Hadsell et al.'s 2006 loss with a margin of 3; no outputs."""
    left, right = model(batch["left"], batch["right"])
    # The squares are kept off 0, where the root has no derivative.
    distance = ((left - right).square().sum(1) + 1e-6).sqrt()
    same = batch["same"].float()
    each: Tensor = same * distance.square() + (1 - same) * F.relu(3 - distance).square()
    return each.mean()


def accuracy(model: nn.Module, test: Data) -> float:
    """Return the share of right answers; targets below 0 don't count."""
    inputs, targets = test.values()
    is_right: Tensor = model(inputs).argmax(1) == targets
    return is_right[targets >= 0].float().mean().item()


def explained(model: nn.Module, test: Data) -> float:
    """Return R^2, the share of the targets' variance that is explained; non-finite counts as 0."""
    inputs, targets = test.values()
    missed: Tensor = (model(inputs).float() - targets).square().mean() / targets.var()
    return max(0.0, 1 - missed.nan_to_num(1.0, 1.0, 1.0).item())


def pixels_right(model: nn.Module, test: Data) -> float:
    """Return the share of pixels on the right side of a half."""
    images = test["images"]
    is_right: Tensor = (model(images) > 0) == (images > 0.5)
    return is_right.float().mean().item()


def pairs_right(model: nn.Module, test: Data) -> float:
    """Return the share of pairs on the right side of half the margin."""
    left, right = model(test["left"], test["right"])
    is_right: Tensor = ((left - right).norm(dim=1) < 1.5) == (test["same"] == 1)
    return is_right.float().mean().item()


def sgd(lr: float, momentum: float = 0.9) -> Callable[[nn.Module], Optimizer]:
    """Return a function that makes an SGD over a model's parameters."""
    return lambda model: SGD(model.parameters(), lr=lr, momentum=momentum)


def adam(lr: float, *, eps: float = 1e-8) -> Callable[[nn.Module], Optimizer]:
    """Return a function that makes an Adam over a model's parameters."""
    return lambda model: Adam(model.parameters(), lr=lr, eps=eps)


CNN = Task(
    architecture="SimpleCNN",
    load=functools.partial(data.digits, (0, 1)),
    build=SimpleCNN,
    loss=cross_entropy,
    optimizer=sgd(0.02),
    score=accuracy,
    num_examples=1280,
    batch_size=32,
    epochs=2,
    least_score=0.985,
    num_classes=10,
)
SMALL_CNN = Task(
    architecture="small CNN",
    load=functools.partial(data.digits, (0, 1, 4), is_small=True),
    build=SmallCNN,
    loss=cross_entropy,
    optimizer=sgd(0.02),
    score=accuracy,
    num_examples=2400,
    batch_size=32,
    epochs=3,
    least_score=0.97,
    num_classes=10,
)
NORM_MLP = Task(
    architecture="MLP with BatchNorm",
    load=data.blobs,
    build=NormMLP,
    loss=cross_entropy,
    optimizer=sgd(0.05),
    score=accuracy,
    num_examples=1600,
    batch_size=32,
    epochs=3,
    num_classes=5,
)
MLP = Task(
    architecture="MLP",
    load=data.blobs,
    build=PlainMLP,
    loss=cross_entropy,
    optimizer=sgd(0.02),
    score=accuracy,
    num_examples=1600,
    batch_size=32,
    epochs=4,
    num_classes=5,
)
TABLE = Task(
    architecture="TabularMLP",
    load=functools.partial(data.blobs, 5, 50.0),
    build=functools.partial(TabularMLP, data.NUM_FEATURES, 5),
    loss=cross_entropy,
    optimizer=adam(0.005),
    score=accuracy,
    num_examples=1600,
    batch_size=32,
    epochs=3,
    num_classes=5,
)
GRU = Task(
    architecture="GRU",
    load=data.sentences,
    build=SentenceGRU,
    loss=cross_entropy,
    optimizer=adam(0.01),
    score=accuracy,
    num_examples=1600,
    batch_size=32,
    epochs=3,
    num_classes=4,
)
RNN = Task(
    architecture="ReLU RNN",
    load=data.series,
    build=SeriesRNN,
    loss=cross_entropy,
    optimizer=sgd(0.01),
    score=accuracy,
    num_examples=1600,
    batch_size=32,
    epochs=4,
    clip_norm=1.0,
    num_classes=3,
)
TAGGER = Task(
    architecture="transformer",
    load=data.tagged_sentences,
    build=Tagger,
    loss=tag_loss,
    optimizer=adam(0.005),
    score=accuracy,
    num_examples=1920,
    batch_size=32,
    epochs=5,
)
REGRESSION = Task(
    architecture="regression MLP",
    load=data.curve,
    build=functools.partial(PlainMLP, num_outputs=1),
    loss=squared_error,
    optimizer=sgd(0.02),
    score=explained,
    num_examples=1600,
    batch_size=32,
    epochs=8,
)
AUTOENCODER = Task(
    architecture="autoencoder",
    load=functools.partial(data.images_alone, (0, 1, 4)),
    build=Autoencoder,
    loss=pixel_loss,
    optimizer=adam(0.01),
    score=pixels_right,
    num_examples=1600,
    batch_size=32,
    epochs=4,
    least_score=0.9,
    form="tensor",
)
TWINS = Task(
    architecture="siamese net",
    load=data.pairs,
    build=Twins,
    loss=contrastive_loss,
    optimizer=adam(0.003),
    score=pairs_right,
    num_examples=1600,
    batch_size=32,
    epochs=4,
    form="dict",
)

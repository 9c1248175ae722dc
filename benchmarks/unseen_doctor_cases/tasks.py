"""Small data sets, models, losses and metrics that the cases share; all drawn from a seed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.unseen_doctor_cases.case import Batch, Score, Step


def rng(seed: int, salt: int = 0) -> torch.Generator:
    """Return a generator of its own for one purpose of a seed."""
    return torch.Generator().manual_seed(1000 * seed + salt)


def minibatches(
    train: Batch, *, seed: int, size: int = 32, epochs: int = 6, is_shuffled: bool = True
) -> list[Step]:
    """Return the steps of a training, each epoch shuffled anew."""
    drawn, num = rng(seed, 1), len(train[0])
    steps = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(num, generator=drawn) if is_shuffled else torch.arange(num)
        steps += [
            Step(tuple(tensor[part] for tensor in train), part, epoch)
            for part in torch.split(order, size)
        ]
    return steps


def some(num: int, count: int, *, seed: int) -> Tensor:
    """Return the numbers of a few samples, drawn without replacement and sorted."""
    return torch.randperm(num, generator=rng(seed, 2))[:count].sort().values


def as_set(numbers: Tensor | Sequence[int]) -> frozenset[int]:
    """Return sample numbers as a set."""
    return frozenset(int(number) for number in numbers)


def _split(tensors: Batch, num: int) -> tuple[Batch, Batch]:
    return tuple(tensor[:num].clone() for tensor in tensors), tuple(
        tensor[num:].clone() for tensor in tensors
    )


def blobs(
    seed: int, *, num: int = 640, dim: int = 10, classes: int = 4, spread: float = 2.2
) -> tuple[Batch, Batch]:
    """Return (inputs [n, dim], labels [n]) around a centre for each class: training, test."""
    drawn = rng(seed, 3)
    centres = spread * torch.randn(classes, dim, generator=drawn)
    labels = torch.randint(classes, (num + 1000,), generator=drawn)
    inputs = centres[labels] + torch.randn(num + 1000, dim, generator=drawn)
    return _split((inputs, labels), num)


def plane(seed: int, *, num: int = 640, dim: int = 6) -> tuple[Batch, Batch]:
    """Return (inputs [n, dim], targets [n, 1]) of a bent plane: training, test."""
    drawn = rng(seed, 4)
    inputs = torch.randn(num + 1000, dim, generator=drawn)
    direction = torch.randn(dim, 1, generator=drawn) / dim**0.5
    targets = inputs @ direction + 0.3 * torch.tanh(inputs[:, :1] * inputs[:, 1:2])
    return _split((inputs, targets), num)


def token_rows(
    seed: int, *, num: int = 640, length: int = 10, vocab: int = 31, classes: int = 3
) -> tuple[Batch, Batch]:
    """Return (tokens [n, length] with 0 as padding, labels [n]): training, test."""
    drawn, total = rng(seed, 5), num + 1000
    labels = torch.randint(classes, (total,), generator=drawn)
    each = (vocab - 1) // classes
    own = 1 + labels[:, None] * each + torch.randint(each, (total, length), generator=drawn)
    other = torch.randint(1, vocab, (total, length), generator=drawn)
    tokens = torch.where(torch.rand(total, length, generator=drawn) < 0.7, own, other)
    lengths = torch.randint(3, length + 1, (total, 1), generator=drawn)
    return _split((torch.where(torch.arange(length) < lengths, tokens, 0), labels), num)


def waves(seed: int, *, num: int = 640, length: int = 32) -> tuple[Batch, Batch]:
    """Return (series [n, length] of one of four frequencies, labels [n]): training, test."""
    drawn, total = rng(seed, 6), num + 1000
    labels = torch.randint(4, (total,), generator=drawn)
    phase = 6.28 * torch.rand(total, 1, generator=drawn)
    time = torch.arange(length) / length * 6.28
    clean = torch.sin((2.0 + 2 * labels[:, None]) * time + phase)
    return _split((clean + 0.3 * torch.randn(total, length, generator=drawn), labels), num)


def graphs(seed: int, *, num: int = 640, nodes: int = 8) -> tuple[Batch, Batch]:
    """Return (adjacency [n, nodes, nodes], features [n, nodes, 4], labels [n]).

    The label says which of two features is larger on average.
    """
    drawn, total = rng(seed, 7), num + 1000
    half = (torch.rand(total, nodes, nodes, generator=drawn) < 0.4).float().triu(1)
    ring = torch.roll(torch.eye(nodes), 1, dims=1)
    adjacency = ((half + half.mT + ring + ring.mT) > 0).float()
    features = torch.randn(total, nodes, 4, generator=drawn)
    labels = torch.randint(2, (total,), generator=drawn)
    features[:, :, 0] += 1.2 * labels[:, None]
    return _split((adjacency, features, labels), num)


def mlp(dim: int, out: int, *, width: int = 32) -> nn.Sequential:
    """Return two hidden layers of ReLUs: modules 0, 2 and 4 are linear."""
    return nn.Sequential(
        nn.Linear(dim, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, out),
    )


def adam(model: nn.Module, lr: float = 0.003) -> torch.optim.Adam:
    """Return Adam over the model's parameters."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def sgd(model: nn.Module, lr: float = 0.05, momentum: float = 0.9) -> torch.optim.SGD:
    """Return SGD over the model's parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss and the outputs; labels are the batch's last tensor."""
    outputs = model(*batch[:-1])
    return F.cross_entropy(outputs, batch[-1]), outputs


def squared_error(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean squared error and the outputs."""
    outputs = model(batch[0])
    return F.mse_loss(outputs, batch[1]), outputs


def accuracy(test: Batch) -> Score:
    """Return the share of right answers on a test set, as a function of the model."""

    def score(model: nn.Module) -> float:
        return float((model(*test[:-1]).argmax(dim=1) == test[-1]).float().mean().item())

    return score


def r2(test: Batch) -> Score:
    """Return the share of explained variance on a test set, as a function of the model.

    Only the output's first columns, as many as the targets have, are compared.
    """

    def score(model: nn.Module) -> float:
        outputs = model(test[0])[:, : test[1].shape[1]]
        residual = (outputs - test[1]).square().mean()
        return float(1 - (residual / (test[1] - test[1].mean(dim=0)).square().mean()).item())

    return score

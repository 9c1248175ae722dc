"""The models and the data of the papers that benchmarks.papers repeats, as tasks on MNIST.

    two_nn      784-200-200-10, ReLU; 199,210 parameters (McMahan et al. 2017, "2NN")
    wide_cnn    two 5x5 convolutions of 32 and 64 channels, each with 2x2 max pooling, and 512
                hidden units; 1,663,370 parameters (the same paper, "CNN")
    lenet       two 5x5 convolutions of 6 and 16 channels without padding, 120 and 84 hidden units;
                44,426 parameters (Li et al. 2022, "Federated Learning on Non-IID Data Silos")
    logistic    784-10; 7,850 parameters (Li et al. 2020, "Federated Optimization in Heterogeneous
                Networks"), with that paper's data: 1000 clients of two digits each, their sizes by
                a power law

Inputs are normalised as the service's task `mnist` does it, weights are torch's own first ones.
"""

import functools
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedrounds.data import load_images, to_dataset
from fedrounds.errors import InvalidInput
from fedrounds.seeds import derive_seed
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Examples

_MNIST = find_task("mnist")
_NUM_FEDPROX_CLIENTS = 1000
_NUM_DIGITS = 10
_NUM_SURE = 5
_LOG_SPREAD = 2.0


def _build_two_nn() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 200), nn.ReLU()),
        *(nn.Linear(200, 200), nn.ReLU()),
        nn.Linear(200, 10),
    )


def _build_wide_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(3136, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )


def _build_lenet() -> nn.Module:
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(256, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )
    # The same numbers in another order in memory: a step takes two thirds of the time.
    return model.to(memory_format=torch.channels_last)


def _build_logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@functools.lru_cache(maxsize=1)
def _power_law_shares(data_root: Path | None, seed: int) -> tuple[NDArray[np.int64], ...]:
    """Return each client's examples: five of either digit, and a log-normal part of the rest.

    Client c has the digits c and c + 1 modulo 10. What is left over of a digit stays unused.
    """
    labels = load_images("mnist", "train", data_root=data_root).labels
    rng = np.random.default_rng(derive_seed(seed, "power law"))
    num_alike = 2 * _NUM_FEDPROX_CLIENTS // _NUM_DIGITS
    shares: list[list[NDArray[np.int64]]] = [[] for _ in range(_NUM_FEDPROX_CLIENTS)]
    for digit in range(_NUM_DIGITS):
        examples = rng.permutation(np.flatnonzero(labels == digit))
        weights = rng.lognormal(0, _LOG_SPREAD, num_alike)
        num_rest = len(examples) - num_alike * _NUM_SURE
        sizes = _NUM_SURE + (num_rest * weights / weights.sum()).astype(np.int64)
        holders = [
            client
            for client in range(_NUM_FEDPROX_CLIENTS)
            if digit in (client % _NUM_DIGITS, (client + 1) % _NUM_DIGITS)
        ]
        for client, share in zip(holders, np.split(examples, np.cumsum(sizes)), strict=False):
            shares[client].append(share)
    return tuple(np.sort(np.concatenate(parts)) for parts in shares)


@functools.lru_cache(maxsize=1)
def _all_examples(data_root: Path | None) -> TensorDataset:
    return to_dataset(load_images("mnist", "train", data_root=data_root))


def _load_power_law(request: DataRequest) -> Examples:
    partition = request.partition
    if partition is None or partition.num_partitions != _NUM_FEDPROX_CLIENTS:
        raise InvalidInput(
            f"the task logistic deals its data out by itself, to {_NUM_FEDPROX_CLIENTS} clients; "
            f"start the server with --num-partitions {_NUM_FEDPROX_CLIENTS}"
        )
    share = _power_law_shares(request.data_root, partition.seed)[partition.index]
    chosen = torch.from_numpy(share)
    return TensorDataset(*(tensor[chosen] for tensor in _all_examples(request.data_root).tensors))


def _slow_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        time.sleep(float(os.environ.get("PAPER_STEP_S", "0")))
    return F.cross_entropy(outputs, targets)


two_nn = replace(_MNIST, name="benchmarks.paper_tasks:two_nn", build_model=_build_two_nn)
wide_cnn = replace(_MNIST, name="benchmarks.paper_tasks:wide_cnn", build_model=_build_wide_cnn)
lenet = replace(_MNIST, name="benchmarks.paper_tasks:lenet", build_model=_build_lenet)
logistic = replace(
    _MNIST,
    name="benchmarks.paper_tasks:logistic",
    build_model=_build_logistic,
    load_train=_load_power_law,
    load_labels=None,
)
slow_two_nn = replace(two_nn, name="benchmarks.paper_tasks:slow_two_nn", loss=_slow_loss)

"""Kinds of training beside the classification of one tensor, each over real processes.

Two clients train for 2 rounds of 6 epochs. How good the model must be was written down before the
first run: its loss on the held-out set is at most half of the best constant predictor's, and above
that of 12 epochs of central training on the same examples by at most a tenth of the constant's.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from examples.kinds.class_weights import WEIGHTS
from fedrounds.tasks.loading import batches_in_order, training_batches
from fedrounds.tasks.task import DataRequest, Partition, Task
from fedrounds.training.determinism import repeatable
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import train_model
from tests.acceptance.federation import expect_clean_exits
from tests.processes import ROOT, Scene

SHARE_OF_CONSTANT = 0.5
DISTANCE_FROM_CENTRAL = 0.1
TRAINING = ("--rounds", 2, "--epochs", 6, "--batch-size", 32, "--optimizer", "adam", "--lr", 0.05)


def squares(values: Tensor) -> float:
    """Return the mean squared error of the best constant, the mean."""
    return float((values - values.mean(0)).square().mean())


def bound(values: Tensor) -> float:
    """Return the variational bound where each point [n, 8] is the mean, with no divergence."""
    return 8 * squares(values) / 0.2


def surprise(labels: Tensor, weights: tuple[float, ...] = (1.0,) * 3) -> float:
    """Return the cross-entropy of the best constant: the (weighted) shares of the classes."""
    counts = labels[labels != 255].flatten().bincount().double()
    shares = counts * torch.tensor(weights[: len(counts)])
    shares /= shares.sum()
    return float(-(shares * shares.log()).sum())


def binary_surprise(labels: Tensor) -> float:
    """Return the mean binary cross-entropy of the best constant for each column."""
    shares = labels.double().mean(0)
    return float(-(shares * shares.log() + (1 - shares) * (1 - shares).log()).mean())


KINDS: dict[str, tuple[Callable[..., float], bool]] = {
    "regression:one_target": (squares, False),
    "regression:three_targets": (squares, False),
    "multi_label:task": (binary_surprise, False),
    "one_logit:task": (binary_surprise, False),
    "autoencoder:task": (squares, False),
    "variational:task": (bound, False),
    "dictionary_batch:task": (surprise, True),
    "tuple_outputs:task": (surprise, True),
    "variable_length:task": (surprise, True),
    "sampler_and_workers:task": (surprise, True),
    "three_tensors:task": (surprise, True),
    "segmentation:task": (surprise, True),
    "class_weights:task": (lambda labels: surprise(labels, WEIGHTS), True),
    "autocast:task": (surprise, True),
}
"""The loss of the best constant predictor, and whether targets are classes."""


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_training_federates(scene: Scene, name: str) -> None:
    """It beats a constant predictor, comes near central training, and shows no false accuracy."""
    module, attribute = name.split(":")
    task: Task = getattr(importlib.import_module(f"examples.kinds.{module}"), attribute)
    flags = ("--task", f"examples.kinds.{name}")
    server = scene.server(*flags, *TRAINING, "--min-clients", 2, "--require-all")
    client = scene.client("0-1", server.address, *flags)
    expect_clean_exits(server, client)
    last = scene.history()[-1]

    find_constant, has_classes = KINDS[name]
    constant = find_constant(targets_of(task.load_test(None), name))
    loss = last["evaluation"]["loss"]
    assert loss <= SHARE_OF_CONSTANT * constant
    assert loss <= central_loss(task) + DISTANCE_FROM_CENTRAL * constant
    accuracies = [
        last["evaluation"]["accuracy"],
        *(update["metrics"].get("accuracy") for update in last["updates"]),
    ]
    assert [accuracy is not None for accuracy in accuracies] == [has_classes] * 3


def targets_of(held_out: Any, name: str) -> Tensor:  # noqa: ANN401  # a map-style data set
    """Return what the outputs of a kind of training answer, for all held-out examples."""
    if isinstance(held_out, TensorDataset):
        return held_out.tensors[min(1, len(held_out.tensors) - 1)]
    key = "labels" if name.startswith("dictionary") else 1
    return torch.tensor([held_out[number][key] for number in range(len(held_out))])


def central_loss(task: Task) -> float:
    """Return the held-out loss after training on both clients' examples in this process."""
    # The sampler of the example draws as many as one client has.
    alone = replace(task, num_workers=0)
    shares: list[Dataset[Any]] = []
    for index in (0, 1):
        share = alone.load_train(DataRequest(partition=Partition(index=index, seed=0)))
        assert isinstance(share, Dataset)
        shares.append(share)
    torch.manual_seed(0)
    model = alone.build_model()
    with repeatable(num_threads=1):
        train_model(
            model,
            training_batches(alone, ConcatDataset(shares), batch_size=32, seed=0),
            epochs=12,
            lr=0.05,
            optimizer="adam",
            loss=alone.loss,
            training_step=alone.training_step,
        )
    held_out = alone.load_test(None)
    assert held_out is not None
    return evaluate(
        model,
        batches_in_order(alone, held_out, batch_size=256),
        alone.loss,
        training_step=alone.training_step,
    ).loss


def test_each_kind_is_short() -> None:
    """A task with all that belongs to it, in less than 60 lines; most take 30."""
    lengths = sorted(
        len(path.read_text().splitlines()) for path in (ROOT / "examples/kinds").glob("*.py")
    )
    assert lengths[-1] < 60
    assert lengths[len(lengths) // 2] < 40

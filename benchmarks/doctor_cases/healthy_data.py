"""The odd but healthy data of clients."""

import functools
from collections.abc import Callable

import torch

from benchmarks.doctor_cases import data
from benchmarks.doctor_cases.training import Data

Load = Callable[[], tuple[Data, Data]]


def _chosen(part: Data, indices: torch.Tensor) -> Data:
    return {name: tensor[indices] for name, tensor in part.items()}


def labels_only(load: Load, label: int) -> Load:
    """Return a function that loads the samples of a class."""

    def loaded() -> tuple[Data, Data]:
        train, test = load()
        return _chosen(train, (train["labels"] == label).nonzero().squeeze(1)), test

    return loaded


def mostly_one_class(load: Load, label: int, share: float) -> Load:
    """Return a function that loads a class and a little of the others."""

    def loaded() -> tuple[Data, Data]:
        train, test = load()
        drawn = torch.Generator().manual_seed(21)
        its_own = (train["labels"] == label).nonzero().squeeze(1)
        others = (train["labels"] != label).nonzero().squeeze(1)
        # Repeated where a class hasn't enough of its own.
        its_own = its_own[torch.randint(len(its_own), (round(1000 * share),), generator=drawn)]
        others = others[torch.randint(len(others), (1000 - len(its_own),), generator=drawn)]
        mixed = torch.cat((its_own, others))
        return _chosen(train, mixed[torch.randperm(1000, generator=drawn)]), test

    return loaded


def sorted_by_class(load: Load) -> Load:
    """Return a function that loads the first 2000 samples in the order of their classes."""

    def loaded() -> tuple[Data, Data]:
        train, test = load()
        return _chosen(train, torch.argsort(train["labels"][:2000], stable=True)), test

    return loaded


def tiny(load: Load, num_samples: int) -> Load:
    """Return a function that loads the first few samples."""

    def loaded() -> tuple[Data, Data]:
        train, test = load()
        return _chosen(train, torch.arange(num_samples)), test

    return loaded


def labels_shuffled(load: Load, share: float) -> Load:
    """Return a function that loads all samples, a share of them with another sample's label."""

    def loaded() -> tuple[Data, Data]:
        train, test = load()
        drawn = torch.Generator().manual_seed(22)
        labels = train["labels"]
        strangers = labels[torch.randperm(len(labels), generator=drawn)]
        is_changed = torch.rand(len(labels), generator=drawn) < share
        return train | {"labels": torch.where(is_changed, strangers, labels)}, test

    return loaded


@functools.cache
def perfectly_fitted() -> tuple[Data, Data]:
    """Return rows whose targets are all exactly zero."""
    train, test = data.curve()
    return train | {"targets": torch.zeros_like(train["targets"])}, test


@functools.cache
def several_labels() -> tuple[Data, Data]:
    """Return rows with five labels each that are rarely 1, float32 [n, 5]."""
    train, test = data.blobs()

    def part(split: Data) -> Data:
        wanted = torch.zeros(len(split["labels"]), 5)
        rare = split["labels"] == 0
        wanted[rare, 0] = 1
        wanted[rare & (split["rows"][:, 0] > 0), 1] = 1
        return {"rows": split["rows"], "wanted": wanted}

    return part(train), part(test)


@functools.cache
def heavy_tails() -> tuple[Data, Data]:
    """Return rows with noise of Student's t with 2 degrees of freedom on top."""
    noise = torch.distributions.StudentT(torch.tensor(2.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        train, test = (
            {"rows": split["rows"] + noise.sample(split["rows"].shape), "labels": split["labels"]}
            for split in data.blobs()
        )
    return train, test


@functools.cache
def sparse_rows() -> tuple[Data, Data]:
    """Return rows of which nine numbers in ten are zero, and some rows wholly."""
    drawn = torch.Generator().manual_seed(24)
    train, test = (
        {
            "rows": split["rows"] * (torch.rand(split["rows"].shape, generator=drawn) < 0.3),
            "labels": split["labels"],
        }
        for split in data.blobs()
    )
    return train, test


@functools.cache
def large_rows() -> tuple[Data, Data]:
    """Return rows moved and scaled to 0..255, as pixels that nobody normalised."""
    train, test = (
        {"rows": (split["rows"] * 12 + 128).clamp(0, 255), "labels": split["labels"]}
        for split in data.blobs()
    )
    return train, test


@functools.cache
def text_windows() -> tuple[Data, Data]:
    """Return characters int64 [n, 32] and each next one, half of them blanks."""
    drawn = torch.Generator().manual_seed(25)
    letters = torch.randint(1, 30, (400, 33), generator=drawn)
    text = torch.where(torch.rand(400, 33, generator=drawn) < 0.5, 0, letters)
    whole = {"characters": text[:, :-1].clone(), "next": text[:, 1:].clone()}
    return (
        {name: tensor[:320] for name, tensor in whole.items()},
        {name: tensor[320:] for name, tensor in whole.items()},
    )

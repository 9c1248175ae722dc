"""Cohorts of plain vectors, and what a strategy makes of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.types import EntryKind
from tests.factories import State, write_state

Vectors = npt.NDArray[np.float64]
KINDS = {"w": EntryKind.PARAMETER}


def cohort_of(
    folder: Path,
    base: State,
    updates: Sequence[State],
    *,
    kinds: Mapping[str, EntryKind] = KINDS,
    seed: int = 0,
) -> Cohort:
    """Write the files; each update claims another number of examples, which must not matter."""
    return Cohort(
        base=write_state(folder, base),
        updates=[
            write_state(folder, values, num_examples=number)
            for number, values in enumerate(updates, start=1)
        ],
        kinds=kinds,
        seed=seed,
    )


def aggregate(
    folder: Path,
    strategy: str,
    updates: Vectors,
    parameters: Mapping[str, float] = MappingProxyType({}),
    *,
    base: Vectors | None = None,
    seed: int = 0,
) -> Vectors:
    """Return what a strategy makes of vectors, [num_updates, size], as float64."""
    start = np.zeros(updates.shape[1]) if base is None else base
    cohort = cohort_of(
        folder,
        {"w": torch.from_numpy(start)},
        [{"w": torch.from_numpy(values.copy())} for values in updates],
        seed=seed,
    )
    rule = find_strategy(strategy, parameters)
    return np.concatenate([block.values.numpy() for block in next_blocks(rule, cohort)])


def attacked(
    *,
    num_updates: int = 13,
    num_bad: int = 3,
    size: int = 301,
    attack: Callable[[Vectors], Vectors] | None = None,
) -> Vectors:
    """Return updates around one direction, and bad updates: an attack's, or scattered behind it."""
    generator = np.random.default_rng(7)
    updates = 1 + generator.standard_normal((num_updates, size))
    updates[-num_bad:] = -3 + 2 * generator.standard_normal((num_bad, size))
    if attack is not None:
        updates[-num_bad:] = attack(updates[:-num_bad].copy())
    return updates


def composed(*steps: Callable[[Vectors], Vectors]) -> Callable[[Vectors], Vectors]:
    """Return the steps one after another."""

    def apply(vectors: Vectors) -> Vectors:
        for step in steps:
            vectors = step(vectors.copy())
        return vectors

    return apply

"""What load_train may return, and how its batches are made: collate, sampler, workers, streams."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from fedrounds.errors import InvalidInput
from fedrounds.tasks.loading import (
    batches_in_order,
    load_examples,
    load_held_out,
    training_batches,
)
from fedrounds.tasks.task import DataRequest, Task, count_examples
from fedrounds.training.trial import try_training_step

NUM = 10


class Numbers(Dataset[Any]):
    """Example i is i and noise of all three random streams."""

    def __len__(self) -> int:
        """Return how many there are."""
        return NUM

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        """Return the number and the noise."""
        return index, float(torch.rand(())), random.random(), float(np.random.rand())


class Stream(IterableDataset[Any]):
    """Pairs that are read one after the other."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield them."""
        for number in range(NUM):
            yield torch.full((3,), float(number)), torch.tensor(number % 2)


def as_list(examples: list[Any]) -> list[Any]:
    """Collate into a list."""
    return examples


def make_task(examples: Any, **options: Any) -> Task:  # noqa: ANN401
    fields: dict[str, Any] = {
        "name": "own",
        "build_model": lambda: nn.Linear(3, 2),
        "load_train": lambda _: examples,
        "load_test": lambda _: examples,
        "loss": F.cross_entropy,
    }
    return Task(**(fields | options))


def numbers_of(task: Task, seed: int, *, numbers: list[int] | None = None) -> list[list[int]]:
    """Return the numbers of each batch of two epochs, and check that the doctor gets the same."""
    examples = load_examples(task, DataRequest())
    loader = training_batches(task, examples, batch_size=4, seed=seed, numbers=numbers)
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append([int(example[0]) for example in batch])
            assert loader.newest_indices == seen[-1]  # type: ignore[attr-defined]
    return seen


def test_collate_gets_the_examples_and_the_order_comes_from_the_seed() -> None:
    task = make_task(Numbers(), collate=as_list)
    assert numbers_of(task, 1) == numbers_of(task, 1) != numbers_of(task, 2)
    first = numbers_of(task, 1)[:3]
    assert sorted(number for batch in first for number in batch) == list(range(NUM))
    in_order = list(batches_in_order(task, Numbers(), batch_size=6))
    assert [[example[0] for example in batch] for batch in in_order] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9],
    ]


def test_a_batch_size_of_the_tasks_own_replaces_the_servers() -> None:
    task = make_task(Numbers(), collate=as_list, batch_size=7)
    assert [len(batch) for batch in numbers_of(task, 1)] == [7, 3, 7, 3]


def test_a_sampler_chooses_the_examples_also_among_those_not_held_out() -> None:
    """Examples below 4 have no weight; of 2, 5, 6 and 8 the sampler knows the positions alone."""

    def choose(examples: Any, generator: torch.Generator) -> WeightedRandomSampler:  # noqa: ANN401
        weights = [float(examples[number][0] >= 4) for number in range(len(examples))]
        return WeightedRandomSampler(weights, num_samples=8, generator=generator)

    task = make_task(Numbers(), collate=as_list, sampler=choose)
    drawn = numbers_of(task, 1)
    assert drawn == numbers_of(task, 1)
    assert drawn[:2] != drawn[2:]
    assert [len(batch) for batch in drawn] == [4, 4, 4, 4]
    assert {number for batch in drawn for number in batch} <= set(range(4, NUM))
    some = numbers_of(task, 1, numbers=[2, 5, 6, 8])
    assert {number for batch in some for number in batch} == {5, 6, 8}


def test_workers_give_the_same_batches_in_order_and_repeat_their_noise() -> None:
    """The order is that without workers; their random streams begin at the order's seed."""
    alone = make_task(Numbers(), collate=as_list)
    task = replace(alone, num_workers=2)
    examples = load_examples(task, DataRequest())
    noise = []
    for _ in range(2):
        loader = training_batches(task, examples, batch_size=4, seed=1)
        batches = []
        for batch in loader:
            batches.append(batch)
            assert loader.newest_indices == [example[0] for example in batch]  # type: ignore[attr-defined]
        assert [[example[0] for example in batch] for batch in batches] == numbers_of(alone, 1)[:3]
        noise.append(batches)
        del loader
    assert noise[0] == noise[1]


@pytest.mark.parametrize("what", ["collate", "data set"])
def test_what_a_worker_cant_import_is_refused_in_a_sentence(what: str) -> None:
    class Local(Numbers):
        pass

    examples = Local() if what == "data set" else Numbers()
    task = make_task(
        examples, num_workers=1, collate=as_list if what == "data set" else lambda x: x
    )
    with pytest.raises(
        InvalidInput, match=f"num_workers is 1, but .* can't import its {what}, .*<"
    ):
        load_examples(task, DataRequest())


def test_an_iterable_data_set_is_counted_and_trains() -> None:
    task = make_task(Stream())
    examples = load_examples(task, DataRequest())
    assert count_examples(task, examples, loaded_by="load_train") == NUM
    loader = training_batches(task, examples, batch_size=4, seed=1)
    assert len(loader) == 3
    assert [len(targets) for _, targets in loader] == [4, 4, 2]
    try_training_step(task, examples, device=torch.device("cpu"))
    held_out = load_held_out(task, None)
    assert held_out is not None
    assert len(list(batches_in_order(task, held_out, batch_size=5))) == 2


def test_a_data_loader_keeps_its_batches_and_draws_from_the_orders_seed() -> None:
    inputs = torch.arange(NUM).float()[:, None].expand(NUM, 3)
    given: DataLoader[Any] = DataLoader(
        TensorDataset(inputs, torch.arange(NUM) % 2), batch_size=3, shuffle=True, drop_last=True
    )
    task = make_task(given)
    examples = load_examples(task, DataRequest())
    assert count_examples(task, examples, loaded_by="load_train") == NUM

    def drawn(seed: int) -> list[list[float]]:
        before = torch.get_rng_state()
        loader = training_batches(task, examples, batch_size=5, seed=seed)
        batches = [inputs[:, 0].tolist() for _ in range(2) for inputs, _ in loader]
        assert torch.equal(torch.get_rng_state(), before)
        return batches

    assert [len(batch) for batch in drawn(1)] == [3] * 6
    assert drawn(1) == drawn(1) != drawn(2)
    try_training_step(task, examples, device=torch.device("cpu"))


def test_workers_of_a_data_loader_are_never_forked() -> None:
    given: DataLoader[Any] = DataLoader(Numbers(), num_workers=1)
    loader = training_batches(make_task(given), given, batch_size=1, seed=0)
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


def test_settings_of_batches_out_of_range_are_refused() -> None:
    for options in ({"num_workers": -1}, {"batch_size": 0}):
        with pytest.raises(InvalidInput, match="num_workers must be 0 or more and batch_size 1"):
            make_task(Numbers(), **options)

"""make_loader gives each example once an epoch, in an order that depends on its seed alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedrounds.data import make_loader, set_aside
from fedrounds.errors import InvalidInput


class NumberedExamples(Dataset[tuple[Tensor, ...]]):
    """Example i is (i, i); not a TensorDataset, so it is read one by one."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return torch.tensor(index), torch.tensor(index)


@given(num=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 2**63 - 1))
def test_a_loader_gives_each_example_once_an_epoch(num: int, batch_size: int, seed: int) -> None:
    """All batches but the last are full; inputs and targets stay together."""
    loader = make_loader(
        TensorDataset(torch.arange(num), -torch.arange(num)), batch_size=batch_size, seed=seed
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(num / batch_size)
        assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
        order = torch.cat([inputs for inputs, _ in batches])
        assert sorted(order.tolist()) == list(range(num))
        assert torch.equal(torch.cat([targets for _, targets in batches]), -order)


def test_a_loaders_order_comes_from_its_seed_or_generator_alone() -> None:
    examples = TensorDataset(torch.arange(100))

    def order(seed: int | None = None, *, generator: torch.Generator | None = None) -> list[int]:
        loader = make_loader(examples, batch_size=100, seed=seed, generator=generator)
        before = torch.get_rng_state()
        epochs: list[list[int]] = [next(iter(loader))[0].tolist() for _ in range(2)]
        assert epochs[0] != epochs[1]
        assert torch.equal(torch.get_rng_state(), before)
        return epochs[0] + epochs[1]

    assert order(5) == order(5) == order(generator=torch.Generator().manual_seed(5))
    assert order(5) != order(6)
    still = make_loader(examples, batch_size=100, shuffle=False)
    assert next(iter(still))[0].tolist() == list(range(100))


def test_a_loader_reads_any_map_style_data_set() -> None:
    """Example by example, in the same order and the same batches as tensors are gathered."""
    slow = list(make_loader(NumberedExamples(), batch_size=4, seed=3))
    numbers = torch.arange(10)
    fast = list(make_loader(TensorDataset(numbers, numbers), batch_size=4, seed=3))
    assert [len(inputs) for inputs, _ in slow] == [4, 4, 2]
    for batch, other in zip(slow, fast, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def test_a_loader_that_makes_no_sense_is_refused() -> None:
    examples = TensorDataset(torch.arange(3))
    with pytest.raises(InvalidInput, match="batch_size must be at least 1"):
        make_loader(examples, batch_size=0, seed=1)
    with pytest.raises(InvalidInput, match="needs a seed or a generator"):
        make_loader(examples, batch_size=1)
    with pytest.raises(InvalidInput, match="not both"):
        make_loader(examples, batch_size=1, seed=1, generator=torch.Generator())
    with pytest.raises(InvalidInput, match="no examples"):
        make_loader(TensorDataset(torch.arange(0)), batch_size=1, seed=1)


@given(
    num=st.integers(1, 200), share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**63 - 1)
)
def test_what_is_set_aside_and_what_is_left_are_all_examples(
    num: int, share: float, seed: int
) -> None:
    """As many as the share says, at least one and never all; a smaller share is a part of it."""
    left, held_out = set_aside(num, share=share, seed=seed)
    assert sorted([*left, *held_out]) == list(range(num))
    assert (left, held_out) == (sorted(left), sorted(held_out))
    if share == 0 or num == 1:
        assert not held_out
    else:
        assert 1 <= len(held_out) < num
        assert abs(len(held_out) - share * num) <= 1
        assert set(set_aside(num, share=share / 2, seed=seed)[1]) <= set(held_out)


def test_a_loader_of_some_examples_gives_those_and_tells_their_own_numbers() -> None:
    """Each once an epoch, in an order of the seed; a diagnosis names them as in the data set."""
    examples = TensorDataset(torch.arange(100))
    some = [3, 5, 8, 90, 99]
    loader = make_loader(examples, batch_size=2, seed=1, numbers=some)
    for _ in range(2):
        seen = []
        for (batch,) in loader:
            assert batch.tolist() == loader.newest_indices
            seen += batch.tolist()
        assert sorted(seen) == some
    in_order = make_loader(examples, batch_size=2, shuffle=False, numbers=some)
    assert torch.cat([batch for (batch,) in in_order]).tolist() == some
    assert len(loader) == len(in_order) == 3

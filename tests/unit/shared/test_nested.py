"""The one mapper: any structure is kept, leaves are changed, and what isn't structure passes."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fedrounds.nested import items_of, leaves_of, map_leaves, to_device

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass(frozen=True)
class Sample:
    """A frozen dataclass, as a data set's items are."""

    image: Tensor
    name: str


class Encoding(UserDict[str, Any]):
    """A mapping with a method `to`, as a tokenizer returns."""

    def to(self, device: object) -> "Encoding":
        """Never called: what is inside is moved."""
        raise AssertionError(device)


class Graph:
    """An object that shows no structure, but moves itself."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: object) -> "Graph":
        """Return it on another device."""
        return Graph(str(device))


def doubled(leaf: object) -> object:
    """Return twice a tensor; anything else as it is."""
    return 2 * leaf if isinstance(leaf, Tensor) else leaf


ONE = torch.ones(2)


@pytest.mark.parametrize(
    "value",
    [
        ONE,
        (ONE, "a", None),
        [ONE, 3],
        {"x": ONE, "meta": {"ids": ["a", "b"], "none": None}},
        OrderedDict(x=ONE),
        Pair(ONE, [ONE]),
        Sample(ONE, "a"),
        Encoding(x=ONE),
        torch.max(torch.ones(2, 2), dim=0),
        [],
        {},
        "text",
        None,
    ],
)
def test_any_structure_is_kept_and_every_tensor_changed(value: object) -> None:
    """Type, names and other leaves stay; the value that was given isn't changed."""
    before = [torch.clone(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(value)]
    changed = map_leaves(value, doubled)
    assert type(changed) is type(value)
    pairs = list(zip(before, leaves_of(changed), leaves_of(value), strict=True))
    for old, new, given in pairs:
        if isinstance(old, Tensor):
            assert torch.equal(new, 2 * old)
            assert torch.equal(given, old)
        else:
            assert new is given
    names = [name for name, _ in items_of(value) or ()]
    assert [name for name, _ in items_of(changed) or ()] == names


def test_what_cannot_be_written_to_becomes_a_dict() -> None:
    """A read-only mapping has no copy to write into."""
    assert map_leaves(MappingProxyType({"a": 1}), lambda leaf: leaf + 1) == {"a": 2}


def test_what_moves_itself_is_moved_by_itself() -> None:
    """Tensors go to the device, strings stay, and a packed sequence keeps its own `to`."""
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = to_device({"g": Graph(), "n": "a", "x": ONE, "e": Encoding(x=ONE), "p": packed}, "meta")
    assert moved["g"].device == "meta"
    assert moved["n"] == "a"
    assert moved["x"].device.type == moved["e"]["x"].device.type == "meta"
    assert moved["p"].data.device.type == "meta"
    assert moved["p"].batch_sizes.device.type == "cpu"


def test_the_caller_may_name_further_leaves() -> None:
    """A list of strings counts as one leaf where the caller says so."""
    seen: list[object] = []
    map_leaves({"t": ["a", "b"]}, seen.append, is_leaf=lambda value: isinstance(value, list))
    assert seen == [["a", "b"]]

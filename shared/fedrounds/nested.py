"""Batches and outputs of any structure: the project's only way through them.

Mappings, lists, tuples, named tuples and dataclasses are structure, as in torch.utils.data's
collate functions. Everything else is a leaf: a tensor, a string, a number, None, and an object that
shows no structure, such as a graph that moves itself by its own `to`. (optree would do the same
for registered types, but knows neither dataclasses nor Hugging Face's mappings.)
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def map_leaves(
    value: Any,  # noqa: ANN401  # any structure
    change: Callable[[Any], Any],
    *,
    is_leaf: Callable[[Any], bool] = lambda _: False,
) -> Any:  # noqa: ANN401  # the same structure
    """Return a value of the same structure with every leaf changed; `is_leaf` names further leaves.

    Structure is copied, leaves are what `change` returns.
    """
    items = None if is_leaf(value) else items_of(value)
    if items is None:
        return change(value)
    return _rebuilt(value, [map_leaves(member, change, is_leaf=is_leaf) for _, member in items])


def leaves_of(value: object) -> Iterator[Any]:
    """Yield the leaves in the order of `map_leaves`."""
    items = items_of(value)
    if items is None:
        yield value
        return
    for _, item in items:
        yield from leaves_of(item)


def to_device(value: Any, device: str | torch.device) -> Any:  # noqa: ANN401  # any structure
    """Return a value with everything that has a method `to` moved to a device."""
    return map_leaves(value, lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf)


def items_of(value: object) -> Sequence[tuple[object, Any]] | None:
    """Return the names (keys, fields, positions) and values inside a value, None for a leaf."""
    names: Iterable[object] | None = None
    values: Iterable[Any] = ()
    if isinstance(value, Tensor):
        pass
    elif isinstance(value, Mapping):
        names, values = value.keys(), value.values()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        # A named tuple that moves itself (PackedSequence) keeps a part of it on the processor.
        names, values = None if hasattr(value, "to") else value._fields, value
    elif isinstance(value, tuple | list):
        names, values = range(len(value)), value
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        values = [getattr(value, field.name) for field in fields(value)]
    return None if names is None else list(zip(names, values, strict=True))


def _rebuilt(value: Any, items: list[Any]) -> Any:  # noqa: ANN401  # any structure
    """Return a copy of a structure with other items."""
    if isinstance(value, Mapping):
        changed = dict(zip(value, items, strict=True))
        if type(value) is dict or not isinstance(value, MutableMapping):
            return changed
        clone = copy.copy(value)
        for name, item in changed.items():
            clone[name] = item
        return clone
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return items
    clone = copy.copy(value)
    for field, item in zip(fields(value), items, strict=True):
        # A frozen dataclass refuses plain assignment.
        object.__setattr__(clone, field.name, item)
    return clone

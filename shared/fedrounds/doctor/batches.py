"""Batches of any structure: their tensors, their samples, their labels.

The samples are in dimension 0 of the tensors, or are the items of lists of equal length.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedrounds.nested import items_of, leaves_of, map_leaves

Batch: TypeAlias = Any
"""Whatever a data loader returns; `fedrounds.nested` says what is seen of it."""

_LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "y"})


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the batch's tensors in their order; those named as labels come last."""
    if isinstance(batch, Tensor):
        return [batch]
    # Most batches are that: it is known without a walk.
    if isinstance(batch, tuple | list) and all(isinstance(one, Tensor) for one in batch):
        return list(batch)
    items = items_of(batch)
    if items is None:
        return []
    in_order = sorted(items, key=lambda item: item[0] in _LABEL_NAMES)
    return [leaf for _, one in in_order for leaf in leaves_of(one) if isinstance(leaf, Tensor)]


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of the same structure with every tensor changed."""
    return map_leaves(batch, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def batch_size(batch: Batch) -> int:
    """Return the number of samples: the length of the first tensor that has one.

    Where the samples are items of lists, it is their length; 1 where no samples can be seen.
    """
    lists = _lists_of_samples(batch)
    if lists is not None:
        return len(lists[0])
    return next((one.shape[0] for one in tensors_of(batch) if one.ndim > 0), 1)


def take(batch: Batch, positions: Sequence[int]) -> Batch:
    """Return the samples at these positions; what has no samples stays as it is.

    A list of as many strings as there are samples has one for each.
    """
    num = batch_size(batch)
    if (lists := _lists_of_samples(batch)) is not None:
        of_samples = {id(one) for one in lists}
        return map_leaves(
            batch,
            lambda one: [one[position] for position in positions] if id(one) in of_samples else one,
            is_leaf=lambda one: id(one) in of_samples,
        )

    def is_text(value: object) -> bool:
        if not isinstance(value, list | tuple) or len(value) != num:
            return False
        return all(isinstance(one, str) for one in value)

    def chosen(leaf: Any) -> Any:  # noqa: ANN401  # any leaf
        if is_text(leaf):
            return type(leaf)(leaf[position] for position in positions)
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != num:
            return leaf
        return leaf[torch.tensor(positions, dtype=torch.int64, device=leaf.device)]

    return map_leaves(batch, chosen, is_leaf=is_text)


def _lists_of_samples(batch: Batch) -> list[Sequence[Any]] | None:
    """Return the lists whose items are the samples, None where tensors hold all samples.

    So do detection's loaders return them: a list of images and a list of their boxes.
    """
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, tuple | list) and all(isinstance(one, Tensor) for one in batch):
        return None
    items = items_of(batch)
    lists: list[Sequence[Any]] = [one for _, one in items or () if isinstance(one, list | tuple)]
    if not lists or len(lists) != len(items or ()) or len({len(one) for one in lists}) != 1:
        return None
    lengths = {one.shape[0] for one in tensors_of(batch) if one.ndim > 0}
    return lists if len(lengths) > 1 else None


IGNORED_LABEL = -100
"""What torch's losses leave out unless told otherwise (ignore_index): not out of range."""


def are_out_of_range(
    labels: Tensor, num_classes: int, ignored: Collection[int] = (IGNORED_LABEL,)
) -> Tensor:
    """Return which labels are no class and not `ignored` by the loss, bool of their shape."""
    is_wrong = (labels < 0) | (labels >= num_classes)
    for one in ignored:
        is_wrong &= labels != one
    return is_wrong


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor of samples as [n, entries of each], also where there are none."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def largest_input(*batches: Batch) -> float:
    """Return the largest absolute finite number in any input, 0 if there is none."""
    largest = [
        float(one.detach().abs().nan_to_num(nan=0.0, posinf=0.0).max())
        for batch in batches
        for one in inputs_of(batch)
        if one.numel() > 0
    ]
    return max(largest, default=0.0)


def joined(first: Batch, second: Batch) -> Batch:
    """Return a batch of the samples of two of the same form.

    Raises:
        RuntimeError: the samples' shapes differ.
    """
    seconds = iter([one for one in leaves_of(second) if isinstance(one, Tensor)])

    def both(one: Tensor) -> Tensor:
        other = next(seconds)
        return one if one.ndim == 0 else torch.cat([one, other])

    return map_tensors(first, both)


def blurred(batch: Batch) -> Batch:
    """Return a batch whose inputs are moved at random by about a hundredth of their size, or 0.01.

    The same for the same batch; torch's own generators aren't touched.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return one
        noise = torch.randn(one.shape, generator=generator).to(one)
        return one + 0.01 * noise * one.abs().clamp(min=1.0)

    return map_tensors(batch, moved)


def inputs_of(batch: Batch) -> list[Tensor]:
    """Return the floating-point tensors that have samples; complex numbers as pairs of floats."""
    if _lists_of_samples(batch) is not None:
        return []
    num = batch_size(batch)
    return [
        torch.view_as_real(one.resolve_conj()) if one.is_complex() else one
        for one in tensors_of(batch)
        if (one.is_floating_point() or one.is_complex()) and one.ndim > 0 and len(one) == num
    ]


def labels_of(batch: Batch, *, num_classes: int | None = None) -> Tensor | None:
    """Return the batch's labels, None if it has none; see `labels_among`."""
    if _lists_of_samples(batch) is not None:
        return None
    return labels_among(tensors_of(batch), batch_size(batch), num_classes=num_classes)


def labels_among(
    tensors: Sequence[Tensor], num_samples: int, *, num_classes: int | None = None
) -> Tensor | None:
    """Return the tensor of whole numbers with so many samples that holds the labels, or None.

    Of several the one most of whose numbers are classes, where it is known how many there are: an
    index into the data set isn't a label. Of equals the last.
    """
    whole = [
        one
        for one in reversed(tensors)
        if one.dtype in _WHOLE and one.ndim > 0 and one.shape[0] == num_samples
    ]
    if len(whole) < 2 or num_classes is None:
        return next(iter(whole), None)
    return max(whole, key=lambda one: _share_of_classes(one, num_classes))


def _share_of_classes(labels: Tensor, num_classes: int) -> float:
    if labels.numel() == 0:
        return 0.0
    return float(((labels >= 0) & (labels < num_classes)).float().mean())


_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})

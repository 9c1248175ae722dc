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
    # Most batches are a list of tensors, which needs no walk.
    if isinstance(batch, tuple | list) and all(isinstance(leaf, Tensor) for leaf in batch):
        return list(batch)
    items = items_of(batch)
    if items is None:
        return []
    in_order = sorted(items, key=lambda item: item[0] in _LABEL_NAMES)
    return [leaf for _, value in in_order for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of the same structure with every tensor changed."""
    return map_leaves(batch, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def batch_size(batch: Batch) -> int:
    """Return the number of samples: the length of the first tensor that has a dimension.

    Where the samples are items of lists, it is their length; 1 where no samples can be seen.
    """
    lists = _lists_of_samples(batch)
    if lists is not None:
        return len(lists[0])
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), 1)


def take(batch: Batch, positions: Sequence[int]) -> Batch:
    """Return the samples at these positions; what has no samples stays as it is.

    A list of as many strings as there are samples holds a string for each.
    """
    num = batch_size(batch)
    if (lists := _lists_of_samples(batch)) is not None:
        of_samples = {id(samples) for samples in lists}
        return map_leaves(
            batch,
            lambda value: (
                [value[position] for position in positions] if id(value) in of_samples else value
            ),
            is_leaf=lambda value: id(value) in of_samples,
        )

    def is_text(value: object) -> bool:
        if not isinstance(value, list | tuple) or len(value) != num:
            return False
        return all(isinstance(item, str) for item in value)

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
    if isinstance(batch, tuple | list) and all(isinstance(leaf, Tensor) for leaf in batch):
        return None
    items = items_of(batch)
    lists: list[Sequence[Any]] = [
        value for _, value in items or () if isinstance(value, list | tuple)
    ]
    if not lists or len(lists) != len(items or ()) or len({len(samples) for samples in lists}) != 1:
        return None
    lengths = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0}
    return lists if len(lengths) > 1 else None


IGNORED_LABEL = -100
"""The label that torch's losses leave out by default (ignore_index): not out of range."""


def are_out_of_range(
    labels: Tensor, num_classes: int, ignored: Collection[int] = (IGNORED_LABEL,)
) -> Tensor:
    """Return which labels are no class and not `ignored` by the loss, bool of their shape."""
    is_wrong = (labels < 0) | (labels >= num_classes)
    for label in ignored:
        is_wrong &= labels != label
    return is_wrong


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor of samples as [n, entries of each], also where there are none."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def largest_input(*batches: Batch) -> float:
    """Return the largest absolute finite number in any input, 0 if there is none."""
    largest = [
        float(inputs.detach().abs().nan_to_num(nan=0.0, posinf=0.0).max())
        for batch in batches
        for inputs in inputs_of(batch)
        if inputs.numel() > 0
    ]
    return max(largest, default=0.0)


def joined(first: Batch, second: Batch) -> Batch:
    """Return a batch of the samples of two of the same form.

    Raises:
        RuntimeError: the samples' shapes differ.
    """
    seconds = iter([leaf for leaf in leaves_of(second) if isinstance(leaf, Tensor)])

    def both(first_leaf: Tensor) -> Tensor:
        second_leaf = next(seconds)
        return first_leaf if first_leaf.ndim == 0 else torch.cat([first_leaf, second_leaf])

    return map_tensors(first, both)


def blurred(batch: Batch) -> Batch:
    """Return a batch whose inputs are moved at random by about a hundredth of their size, or 0.01.

    The same for the same batch; torch's own generators aren't touched.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + 0.01 * noise * leaf.abs().clamp(min=1.0)

    return map_tensors(batch, moved)


def inputs_of(batch: Batch) -> list[Tensor]:
    """Return the floating-point tensors that have samples; complex numbers as pairs of floats."""
    if _lists_of_samples(batch) is not None:
        return []
    num = batch_size(batch)
    return [
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        for tensor in tensors_of(batch)
        if (tensor.is_floating_point() or tensor.is_complex())
        and tensor.ndim > 0
        and len(tensor) == num
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

    Of several tensors that with the most numbers that are classes, if `num_classes` is known: an
    index into the data set isn't a label. Of equals the last.
    """
    whole = [
        tensor
        for tensor in reversed(tensors)
        if tensor.dtype in _WHOLE and tensor.ndim > 0 and tensor.shape[0] == num_samples
    ]
    if len(whole) < 2 or num_classes is None:
        return next(iter(whole), None)
    return max(whole, key=lambda tensor: _share_of_classes(tensor, num_classes))


def _share_of_classes(labels: Tensor, num_classes: int) -> float:
    if labels.numel() == 0:
        return 0.0
    return float(((labels >= 0) & (labels < num_classes)).float().mean())


_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})

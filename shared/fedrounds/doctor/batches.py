"""Batches of any shape: a tensor, or a tuple, list or dict of tensors, samples in dimension 0."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedrounds.errors import InvalidInput

Batch: TypeAlias = Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor]


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the batch's tensors in their order."""
    if isinstance(batch, tuple | list):
        return list(batch)
    return [batch] if isinstance(batch, Tensor) else list(batch.values())


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of the same form with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: change(one) for name, one in batch.items()}
    changed = [change(one) for one in batch]
    if isinstance(batch, list):
        return changed
    # A named tuple takes its fields one by one.
    return type(batch)(*changed) if hasattr(batch, "_fields") else tuple(changed)


def batch_size(batch: Batch) -> int:
    """Return the number of samples: the length of the first tensor that has one.

    Raises:
        InvalidInput: no tensor of the batch has a dimension.
    """
    for one in tensors_of(batch):
        if one.ndim > 0:
            return one.shape[0]
    raise InvalidInput("a batch needs a tensor with the samples in dimension 0, but has none")


def take(batch: Batch, positions: Sequence[int]) -> Batch:
    """Return the samples at these positions; tensors without samples stay as they are."""
    num = batch_size(batch)

    def chosen(one: Tensor) -> Tensor:
        if one.ndim == 0 or len(one) != num:
            return one
        return one[torch.tensor(positions, dtype=torch.int64, device=one.device)]

    return map_tensors(batch, chosen)


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
    seconds = iter(tensors_of(second))

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
    """Return the floating-point tensors that have samples."""
    num = batch_size(batch)
    return [
        one
        for one in tensors_of(batch)
        if one.is_floating_point() and one.ndim > 0 and len(one) == num
    ]


def labels_of(batch: Batch, *, num_classes: int | None = None) -> Tensor | None:
    """Return the batch's labels, None if it has none; see `labels_among`."""
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

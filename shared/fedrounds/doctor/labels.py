"""The labels that a loss passes over, read off its own call and not by trying them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fedrounds.doctor.batches import IGNORED_LABEL, Batch, labels_of, map_tensors
from fedrounds.doctor.stepping import TrainingState

_LOSSES = {F.cross_entropy: 4, F.nll_loss: 4}
"""The losses of torch with labels, and where `ignore_index` stands among their arguments."""


def ignored_labels(training: TrainingState, batch: Batch) -> frozenset[int]:
    """Return the labels that the loss passes over, as the calls of torch's losses name them.

    The loss is computed with every label out of range replaced by 0: on a GPU the label itself
    would end the process. Random streams and buffers are left as they are.
    """
    num_classes = training.num_classes
    labels = labels_of(batch, num_classes=num_classes)
    if labels is None or num_classes is None:
        return frozenset({IGNORED_LABEL})
    is_class = (labels >= 0) & (labels < num_classes)
    safe = torch.where(is_class, labels, torch.zeros_like(labels))
    seen = _Calls()
    buffers = [buffer.detach().clone() for buffer in training.model.buffers()]
    generator = torch.default_generator.get_state()
    try:
        with seen:
            training.compute_loss(
                training.model, map_tensors(batch, lambda leaf: safe if leaf is labels else leaf)
            )
    finally:
        torch.default_generator.set_state(generator)
        with torch.no_grad():
            for buffer, kept in zip(training.model.buffers(), buffers, strict=True):
                buffer.copy_(kept)
    return frozenset({IGNORED_LABEL, *seen.ignored})


class _Calls(TorchFunctionMode):
    """Remembers the `ignore_index` of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored: set[int] = set()

    def __torch_function__(  # torch's own signature
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever the function gives
        named = dict(kwargs or {})
        if func in _LOSSES:
            position = _LOSSES[func]
            given = named.get("ignore_index", args[position] if len(args) > position else None)
            if isinstance(given, int):
                self.ignored.add(given)
        return func(*args, **named)

"""Evaluation of a model. Pure PyTorch, like fedrounds.training.loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.errors import InvalidInput
from fedrounds.nested import to_device

Batches = Iterable[tuple[Tensor, ...] | list[Tensor]]
Loss = Callable[[Any, Tensor], Tensor]
"""Takes (the model's output, targets) of a batch to its mean loss."""

_MAIN_NAMES = ("logits", "out", "main")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in 0..1 and mean loss over `num_examples`; the loss of a broken model is nan.

    `metrics` holds the means of the requested metrics, by name. `confusion`, if requested, is int64
    [num_classes, num_classes + 1]: rows are true classes, columns predicted classes, each entry a
    number of targets. The last column counts outputs that predict no class, such as nan.
    """

    accuracy: float
    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    confusion: Tensor | None = None


def evaluate(
    model: nn.Module,
    dataloader: Batches,
    loss: Loss = F.cross_entropy,
    device: str | torch.device = "cpu",
    *,
    metrics: Mapping[str, Loss] = MappingProxyType({}),
    num_classes: int | None = None,
) -> Evaluation:
    """Evaluate `model` on all batches, in evaluation mode; restore its modes afterwards.

    Batches, outputs and `loss` are as in `train_model`; each of `metrics` is like `loss`, but may
    return a Python number too. With
    `num_classes`, which bounds the targets, it counts a confusion matrix too. An output with a nan
    is never correct: argmax would call it class 0, and a model full of nan would get the share of
    that class as its accuracy.

    Raises:
        InvalidInput: no examples, outputs that don't fit the targets, or a loss or metric that is
            no single number.
    """
    means: list[Tensor] = []
    sizes: list[int] = []
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    num_targets = 0
    confusion = (
        None
        if num_classes is None
        else torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)
    )
    model.to(device)
    with _evaluation_mode(model), torch.no_grad():
        for batch_inputs, batch_targets in dataloader:
            inputs, targets = to_device((batch_inputs, batch_targets), device)
            outputs = model(inputs)
            mean_loss = validate_loss(loss(outputs, targets))
            others = [
                _metric_value(name, metric(outputs, targets)).to(mean_loss)
                for name, metric in metrics.items()
            ]
            means.append(torch.stack([mean_loss, *others]))
            sizes.append(len(targets))
            answers = main_output(outputs)
            num_correct += count_correct(answers, targets)
            num_targets += targets.numel()
            if confusion is not None:
                confusion += _count_answers(answers, targets, len(confusion))
    num_examples = sum(sizes)
    if num_examples == 0:
        raise InvalidInput("there are no examples to evaluate the model on")
    # Read the values only now, so that the device never waits for the CPU.
    weights = torch.tensor(sizes, dtype=torch.float64) / num_examples
    overall_loss, *overall_metrics = (weights @ torch.stack(means).cpu().double()).tolist()
    return Evaluation(
        accuracy=num_correct.item() / num_targets,
        loss=overall_loss,
        num_examples=num_examples,
        metrics=dict(zip(metrics, overall_metrics, strict=True)),
        confusion=None if confusion is None else confusion.cpu(),
    )


def validate_loss(value: object) -> Tensor:
    """Return the loss that a loss function returned, without dimensions.

    Raises:
        InvalidInput: it isn't a tensor of one element.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value if value.ndim == 0 else value.reshape(())
    raise InvalidInput(
        f"the loss function returned {_described(value)}; it must return the mean loss of the "
        "batch, a tensor of one element"
    )


def _metric_value(name: str, value: object) -> Tensor:
    """Return a metric of a batch as a tensor without dimensions.

    Raises:
        InvalidInput: it isn't a single number.
    """
    if isinstance(value, Number):
        return torch.as_tensor(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    raise InvalidInput(
        f"metric {name!r} returned {_described(value)}; it must return one number for the batch, "
        "as a tensor of one element or a Python number"
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def main_output(outputs: object) -> Tensor:
    """Return the tensor among a model's outputs that predicts the targets.

    In a dictionary it is the first entry of "logits", "out" and "main" that exists, or else the
    first value; in a tuple or a list, named or not, the first item. Both may be nested.

    Raises:
        InvalidInput: there is no such tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and outputs:
        name = next((key for key in _MAIN_NAMES if key in outputs), next(iter(outputs)))
        return main_output(outputs[name])
    if isinstance(outputs, tuple | list) and outputs:
        return main_output(outputs[0])
    raise InvalidInput(
        f"the model returns a {type(outputs).__name__}; it must return a tensor, or a tuple or "
        "dictionary whose first item or entry 'logits', 'out' or 'main' is one"
    )


def count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the number of right answers, a scalar int64 tensor on the outputs' device.

    Raises:
        InvalidInput: outputs and targets don't fit each other.
    """
    if outputs.ndim < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        raise InvalidInput(
            f"outputs {tuple(outputs.shape)} don't fit targets {tuple(targets.shape)}: outputs "
            f"must have the classes in dimension 1, targets be class numbers without it"
        )
    return ((outputs.argmax(dim=1) == targets) & ~outputs.isnan().any(dim=1)).sum()


def _count_answers(outputs: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix of a batch, [num_classes, num_classes + 1]."""
    # A model may have more outputs than there are classes.
    answers = outputs.argmax(dim=1).clamp(max=num_classes)
    answers[outputs.isnan().any(dim=1)] = num_classes
    width = num_classes + 1
    pairs = (targets * width + answers).flatten()
    return pairs.bincount(minlength=num_classes * width).reshape(num_classes, width)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training

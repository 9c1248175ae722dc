"""Evaluation of a model. Pure PyTorch, like fedrounds.training.loop."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.doctor.batches import Batch, batch_size
from fedrounds.errors import InvalidInput
from fedrounds.nested import to_device
from fedrounds.training.objective import (
    Loss,
    TrainingStep,
    compute_loss_of,
    count_answers,
    count_correct,
    described,
    share_of,
    targets_of,
)

Batches = Iterable[Batch]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in 0..1 and mean loss over `num_examples`; the loss of a broken model is nan.

    `accuracy` is None where it means nothing: the targets are no classes (see
    `fedrounds.training.objective.count_correct`).
    `metrics` holds the means of the requested metrics, by name. `confusion`, if requested, is int64
    [num_classes, num_classes + 1]: rows are true classes, columns predicted classes, each entry a
    number of targets. The last column counts outputs that predict no class, such as nan.
    """

    accuracy: float | None
    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    confusion: Tensor | None = None


def evaluate(
    model: nn.Module,
    dataloader: Batches,
    loss: Loss | None = F.cross_entropy,
    device: str | torch.device = "cpu",
    *,
    training_step: TrainingStep | None = None,
    metrics: Mapping[str, Loss] = MappingProxyType({}),
    num_classes: int | None = None,
    counts_confusion: bool = False,
) -> Evaluation:
    """Evaluate `model` on all batches, in evaluation mode; restore its modes afterwards.

    Batches, `loss` and `training_step` are as in `train_model`; each of `metrics` takes (main
    output, targets) to a number. `num_classes` bounds the targets; `counts_confusion` needs it.
    With a training step accuracy is counted only if `num_classes` is known.

    Raises:
        InvalidInput: no examples, or a loss or metric that is no single number.
    """
    compute_loss = compute_loss_of(loss, training_step)
    means: list[Tensor] = []
    sizes: list[int] = []
    has_classes = training_step is None or num_classes is not None
    num_correct, num_targets = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    confusion: Tensor | None = None
    model.to(device)
    with _evaluation_mode(model), torch.no_grad():
        for given in dataloader:
            batch = to_device(given, device)
            mean_loss, outputs = compute_loss(model, batch)
            targets = targets_of(batch, is_pair=training_step is None, num_classes=num_classes)
            others = [
                _metric_value(name, metric(outputs, targets)).to(mean_loss)
                for name, metric in metrics.items()
            ]
            means.append(torch.stack([mean_loss, *others]))
            sizes.append(batch_size(batch))
            if has_classes and (counts := count_correct(outputs, targets)) is not None:
                num_correct += counts[0]
                num_targets += counts[1]
                if counts_confusion and num_classes is not None:
                    answers = count_answers(outputs, targets, num_classes)
                    confusion = answers if confusion is None else confusion + answers
    num_examples = sum(sizes)
    if num_examples == 0:
        raise InvalidInput("there are no examples to evaluate the model on")
    # Read the values only now, so that the device never waits for the CPU.
    weights = torch.tensor(sizes, dtype=torch.float64) / num_examples
    overall_loss, *overall_metrics = (weights @ torch.stack(means).cpu().double()).tolist()
    accuracy = share_of(num_correct, num_targets)
    return Evaluation(
        accuracy=accuracy,
        loss=overall_loss,
        num_examples=num_examples,
        metrics=dict(zip(metrics, overall_metrics, strict=True)),
        confusion=None if confusion is None or accuracy is None else confusion.cpu(),
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
        f"metric {name!r} returned {described(value)}; it must return one number for the batch, "
        "as a tensor of one element or a Python number"
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training

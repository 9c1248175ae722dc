"""Evaluation of a model. Pure PyTorch, like fedrounds.training.loop."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.doctor.batches import Batch, batch_size
from fedrounds.errors import InvalidInput
from fedrounds.nested import to_device
from fedrounds.training.metrics import NO_METRICS, Metric, MetricFactory, make_metrics, metric_value
from fedrounds.training.objective import (
    Loss,
    TrainingStep,
    compute_loss_of,
    count_answers,
    count_correct,
    main_output,
    share_of,
    targets_of,
)

Batches = Iterable[Batch]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in 0..1 and mean loss over `num_examples`; the loss of a broken model is nan.

    `accuracy` is None where it means nothing: the targets are no classes (see
    `fedrounds.training.objective.count_correct`).
    `measured` holds the requested metrics after all batches, by name; none of them if an output
    holds a nan. `confusion`, if requested, is int64 [num_classes, num_classes + 1]: rows are true
    classes, columns predicted classes, each entry a number of targets. The last column counts
    outputs that predict no class, such as nan.
    """

    accuracy: float | None
    loss: float
    num_examples: int
    measured: Mapping[str, Metric] = field(default_factory=dict)
    confusion: Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the metrics over all examples, by name.

        Raises:
            InvalidInput: a metric computes no single number.
        """
        return {name: metric_value(name, metric) for name, metric in self.measured.items()}


def evaluate(
    model: nn.Module,
    dataloader: Batches,
    loss: Loss | None = F.cross_entropy,
    device: str | torch.device = "cpu",
    *,
    training_step: TrainingStep | None = None,
    metrics: Mapping[str, MetricFactory] = NO_METRICS,
    num_classes: int | None = None,
    counts_confusion: bool = False,
) -> Evaluation:
    """Evaluate `model` on all batches, in evaluation mode; restore its modes afterwards.

    Batches, `loss` and `training_step` are as in `train_model`; each of `metrics`
    makes a metric, which is given the main output and the targets of each batch. `num_classes`
    bounds the targets; `counts_confusion` needs it. With a training step accuracy is counted only
    if `num_classes` is known.

    Raises:
        InvalidInput: no examples, a loss that is no single number, a metric's factory that makes no
            metric, or a training step that gives metrics no output or no target.
    """
    compute_loss = compute_loss_of(loss, training_step)
    losses: list[Tensor] = []
    sizes: list[int] = []
    has_classes = training_step is None or num_classes is not None
    num_correct, num_targets = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    confusion: Tensor | None = None
    measured = make_metrics(metrics, device)
    model.to(device)
    with _evaluation_mode(model), torch.no_grad():
        for given in dataloader:
            batch = to_device(given, device)
            mean_loss, outputs = compute_loss(model, batch)
            targets = targets_of(batch, is_pair=training_step is None, num_classes=num_classes)
            losses.append(mean_loss)
            if measured:
                measured = _updated(measured, main_output(outputs), targets)
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
    accuracy = share_of(num_correct, num_targets)
    return Evaluation(
        accuracy=accuracy,
        loss=float(weights @ torch.stack(losses).cpu().double()),
        num_examples=num_examples,
        measured=measured,
        confusion=None if confusion is None or accuracy is None else confusion.cpu(),
    )


def _updated(
    measured: dict[str, Metric],
    output: Tensor | None,
    targets: Any,  # noqa: ANN401
) -> dict[str, Metric]:
    """Return the metrics after another batch; none of them if its output holds a nan.

    A metric would take nan for an answer, as argmax takes it for class 0. To look makes the CPU
    wait for the device: only tasks with metrics pay for it.
    """
    if output is None or targets is None:
        raise InvalidInput(
            f"the task's metrics ({', '.join(measured)}) need outputs and targets: training_step "
            "must return (loss, outputs), and a batch must hold its targets"
        )
    if output.is_floating_point() and bool(output.isnan().any()):
        return {}
    for metric in measured.values():
        metric.update(output, targets)
    return measured


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training

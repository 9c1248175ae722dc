"""What a training minimises: from a model and a batch to a loss, and which outputs answer what.

A task says it in one of two ways. With `loss(outputs, targets)` a batch is (inputs, targets), and
the model is called with the inputs. With `training_step(model, batch)` a batch may be anything.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedrounds.doctor.batches import Batch, labels_of, tensors_of
from fedrounds.doctor.outputs import loss_and_outputs
from fedrounds.errors import InvalidInput
from fedrounds.nested import items_of

Loss = Callable[[Any, Any], Tensor]
"""Takes (the model's outputs, targets) of a batch to its mean loss."""

TrainingStep = Callable[[nn.Module, Batch], Any]
"""Takes (model, batch) to the batch's mean loss, to (loss, outputs), or to a dictionary or an
object with `loss`, whose other entries are the outputs. Of several losses, "loss" is their sum."""

ComputeLoss = Callable[[nn.Module, Batch], tuple[Tensor, Any]]
"""Takes (model, batch) to (loss without dimensions, outputs); None stands for no outputs."""

_MAIN_NAMES = ("logits", "out", "main")


def compute_loss_of(loss: Loss | None, training_step: TrainingStep | None) -> ComputeLoss:
    """Return the function that computes the loss of a batch; a training step goes first.

    The function raises InvalidInput where the result is no loss, or where `loss` is given another
    batch than (inputs, targets).

    Raises:
        InvalidInput: neither is given.
    """
    if training_step is not None:
        return _with_training_step(training_step)
    if loss is None:
        raise InvalidInput("a training needs loss(outputs, targets) or training_step(model, batch)")

    def compute(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        inputs, targets = _pair(batch)
        outputs = model(inputs)
        main = main_output(outputs)
        return validate_loss(loss(outputs, targets)), outputs if main is None else main

    return compute


def _with_training_step(training_step: TrainingStep) -> ComputeLoss:
    def compute(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        computed = training_step(model, batch)
        try:
            loss, outputs = loss_and_outputs(computed)
        except InvalidInput:
            raise InvalidInput(
                f"training_step returned {described(computed)}; it must return the batch's mean "
                "loss (a tensor of one element), (loss, outputs), or a dictionary or an object "
                "with `loss`"
            ) from None
        return loss.reshape(()), outputs

    return compute


def targets_of(batch: Batch, *, is_pair: bool, num_classes: int | None) -> Any:  # noqa: ANN401
    """Return what the outputs of a batch answer, None if nothing is known to be.

    Of a pair, (inputs, targets), it is the second. Of another batch it is the tensor of labels,
    where the number of classes is known, and else the last tensor; one called `labels`, `target` or
    the like comes last.
    """
    if is_pair:
        return _pair(batch)[1]
    if num_classes is not None:
        return labels_of(batch, num_classes=num_classes)
    return next(reversed(tensors_of(batch)), None)


def _pair(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise InvalidInput(
        f"loss(outputs, targets) needs batches of (inputs, targets), but a batch is "
        f"{described(batch)}; give the task training_step(model, batch) instead of loss"
    )


def validate_loss(value: object) -> Tensor:
    """Return the loss that a loss function returned, without dimensions.

    Raises:
        InvalidInput: it isn't a tensor of one element.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value if value.ndim == 0 else value.reshape(())
    raise InvalidInput(
        f"the loss function returned {described(value)}; it must return the mean loss of the "
        "batch, a tensor of one element"
    )


def described(value: object) -> str:
    """Return what a value is, in words for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def main_output(outputs: object) -> Tensor | None:
    """Return the tensor among a model's outputs that predicts the targets, None without any.

    In a dictionary or a dataclass it is the first entry of "logits", "out" and "main" that exists,
    or else the first entry that isn't called "loss"; in a tuple or a list, named or not, the first
    item. They may be nested.
    """
    if isinstance(outputs, Tensor):
        return outputs
    items = items_of(outputs)
    if not items:
        return None
    by_name = {name: item for name, item in items if name != "loss"}
    names = [*(name for name in _MAIN_NAMES if name in by_name), *by_name]
    return main_output(by_name[names[0]]) if names else None


def count_correct(outputs: object, targets: object) -> tuple[Tensor, Tensor] | None:
    """Return the numbers of right answers and of targets that are classes, None without classes.

    There are classes if the targets are whole numbers and the main output has two or more classes
    in dimension 1 and the targets' shape without it. A target that is no class, such as a label
    that the loss ignores, doesn't count. An output with a nan is never right: argmax would call it
    class 0, and a model full of nan would be right about the share of that class.

    Both numbers are int64 tensors without dimensions on the outputs' device.
    """
    answers = main_output(outputs)
    if answers is None or not isinstance(targets, Tensor) or not _are_classes(answers, targets):
        return None
    # The largest of numbers with a nan is nan.
    largest, chosen = answers.max(dim=1)
    is_right = (chosen == targets) & (largest == largest)  # noqa: PLR0124  # not nan
    is_class = targets.clamp(0, answers.shape[1] - 1) == targets
    return is_right.sum(), is_class.sum()


def count_answers(outputs: object, targets: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix of a batch for which `count_correct` returns numbers.

    It is int64 [num_classes, num_classes + 1], see `fedrounds.training.evaluation.Evaluation`.
    """
    answers = main_output(outputs)
    assert answers is not None
    # A model may have more outputs than there are classes.
    largest, chosen = answers.max(dim=1)
    chosen = chosen.clamp(max=num_classes)
    chosen[largest.isnan()] = num_classes
    width = num_classes + 1
    is_class = targets.clamp(0, num_classes - 1) == targets
    pairs = targets[is_class].long() * width + chosen[is_class]
    return pairs.bincount(minlength=num_classes * width).reshape(num_classes, width)


def share_of(num_correct: Tensor, num_targets: Tensor) -> float | None:
    """Return the accuracy that sums of `count_correct` give, None if no target is a class."""
    return num_correct.item() / num if (num := num_targets.item()) else None


def _are_classes(answers: Tensor, targets: Tensor) -> bool:
    return (
        answers.ndim > 1
        and answers.shape[1] > 1
        and answers.shape[:1] + answers.shape[2:] == targets.shape
        and answers.is_floating_point()
        and not targets.is_floating_point()
        and targets.dtype not in _NO_NUMBERS
    )


_NO_NUMBERS = frozenset({torch.bool, torch.complex32, torch.complex64, torch.complex128})

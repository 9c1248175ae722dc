"""The confusion matrix, and the accuracy of each class."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedrounds.training.evaluation import evaluate
from fedserver.models.evaluation import class_accuracies


def counted(answers: list[int], targets: list[int], num_classes: int) -> list[list[int]]:
    """Count pair by pair, the last column for answers that name no class."""
    pairs = list(zip(targets, answers, strict=True))
    return [
        [pairs.count((true, answer)) for answer in range(num_classes)]
        + [sum(target == true and not 0 <= answer < num_classes for target, answer in pairs)]
        for true in range(num_classes)
    ]


def one_hot(answers: list[int], num_outputs: int) -> Tensor:
    """Return outputs [n, num_outputs] that answer so; -1 stands for an output with a nan."""
    outputs = torch.zeros(len(answers), num_outputs)
    for row, answer in enumerate(answers):
        if answer < 0:
            outputs[row] = torch.tensor([math.nan] + [1.0] * (num_outputs - 1))
        else:
            outputs[row, answer] = 1.0
    return outputs


@pytest.mark.parametrize("num_outputs", [4, 6])
def test_each_pair_of_truth_and_answer_is_counted(num_outputs: int) -> None:
    """Over several batches; a nan and an output beyond the classes stand in the last column."""
    generator = torch.Generator().manual_seed(0)
    batches, answers, targets = [], [], []
    for size in (50, 7, 1):
        answered = torch.randint(-1, num_outputs, (size,), generator=generator).tolist()
        true = torch.randint(0, 4, (size,), generator=generator)
        batches.append((one_hot(answered, num_outputs), true))
        answers += answered
        targets += true.tolist()
    evaluation = evaluate(nn.Identity(), batches, num_classes=4, counts_confusion=True)
    assert evaluation.confusion is not None
    assert evaluation.confusion.tolist() == counted(answers, targets, 4)
    right = sum(answer == other for answer, other in zip(answers, targets, strict=True))
    assert evaluation.accuracy == pytest.approx(right / len(targets))
    assert evaluation.confusion.diagonal().sum() == right


def test_answers_for_each_place_count_places() -> None:
    """A text's or an image's targets have more dimensions than the batch's."""
    outputs = torch.zeros(2, 3, 5)
    outputs[:, 2] = 1.0
    targets = torch.tensor([[0, 1, 2, 2, 2], [1, 1, 0, 2, 0]])
    evaluation = evaluate(nn.Identity(), [(outputs, targets)], num_classes=3, counts_confusion=True)
    assert evaluation.confusion is not None
    assert evaluation.confusion.tolist() == [[0, 0, 3, 0], [0, 0, 3, 0], [0, 0, 4, 0]]


def test_it_is_counted_only_if_asked_for() -> None:
    """A task that doesn't say how many classes it has has no matrix."""
    evaluation = evaluate(nn.Identity(), [(torch.eye(3), torch.arange(3))])
    assert evaluation.confusion is None


def test_a_classes_accuracy_is_its_share_of_right_answers() -> None:
    """Answers that name no class count as wrong; a class without examples has no accuracy."""
    confusion = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 2]])
    assert class_accuracies(confusion) == [0.75, None, 0.25]

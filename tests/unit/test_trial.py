"""The trial step: it finds what can't be trained, and leaves no trace."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.errors import InvalidInput, OwnCodeFailed
from shared.own_code import show_error
from shared.tasks import DataRequest, Examples
from shared.trial import try_training_step
from tests import own_code_tasks
from tests.tiny_task import tiny

CPU = torch.device("cpu")


def examples_with(*, num: int = 32, targets: Tensor | None = None) -> Examples:
    """Return examples of the tiny task, some with other targets."""
    whole = tiny.load_train(DataRequest())
    assert isinstance(whole, TensorDataset)
    inputs, labels = whole.tensors
    return TensorDataset(inputs[:num], labels[:num] if targets is None else targets[:num])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("double", "must have the same dtype, but got Double and Float"),
        ("narrow", "shapes cannot be multiplied"),
        ("lossless", f"KeyError: '{own_code_tasks.SECRET}'"),
    ],
)
def test_what_cant_be_trained_fails_with_its_own_error(name: str, sentence: str) -> None:
    """As torch or the task says it, and the traceback begins where the code isn't ours."""
    task = getattr(own_code_tasks, name)
    with pytest.raises(OwnCodeFailed, match=sentence) as caught:
        try_training_step(task, task.load_train(DataRequest()), device=CPU)
    cause = caught.value.__cause__
    assert cause is not None
    assert "shared/" not in show_error(cause)
    assert show_error(cause).startswith("Traceback")


def test_outputs_that_dont_fit_the_targets_are_told() -> None:
    """Without a traceback: there is no error of the task's own."""
    task = replace(tiny, loss=lambda outputs, targets: outputs.square().mean())
    examples = examples_with(targets=torch.zeros(32, 3))
    with pytest.raises(InvalidInput, match="don't fit targets"):
        try_training_step(task, examples, device=CPU)


@pytest.mark.parametrize("num", [2, 8, 32])
def test_what_the_doctor_cures_is_no_reason_not_to_join(num: int) -> None:
    """A label out of range among good ones, an input that is NaN; also with few examples."""
    targets = torch.zeros(32, dtype=torch.int64)
    targets[1] = 7
    try_training_step(replace(tiny, num_classes=None), examples_with(targets=targets), device=CPU)
    examples = examples_with(num=num)
    assert isinstance(examples, TensorDataset)
    examples.tensors[0][1, 2] = torch.nan
    try_training_step(tiny, examples, device=CPU)


def test_it_leaves_no_trace() -> None:
    """Random streams go on as before, whatever the task draws, and the gradient mode stays."""

    def draw(outputs: Tensor, targets: Tensor) -> Tensor:
        noise = torch.rand(()) * random.random() * np.random.rand()
        return nn.functional.cross_entropy(outputs + noise, targets)

    task = replace(tiny, loss=draw)
    seen = []
    for is_tried in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if is_tried:
            try_training_step(task, examples_with(), device=CPU)
        seen.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert seen[0] == seen[1]
    assert torch.is_grad_enabled()

"""Tasks whose own code goes wrong, each in its own place."""

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedrounds.tasks.task import DataRequest, Examples, Task
from tests.tiny_task import tiny

SECRET = "patient 4711"
"""Stands in every error's text, which must not leave the client."""


def _changed(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Task:
    def load(request: DataRequest) -> Examples:
        examples = tiny.load_train(request)
        assert isinstance(examples, TensorDataset)
        return TensorDataset(*change(*examples.tensors))

    return replace(tiny, load_train=load, load_test=lambda _: None)


def _fail(*_: object) -> Tensor:
    raise KeyError(SECRET)


class _FailingMetric:
    """A metric that can't take a batch."""

    def update(self, *_: object) -> None:
        _fail()

    def compute(self) -> float:
        return 0.0


def _fail_to_load(_: DataRequest) -> Examples:
    raise KeyError(SECRET)


def _fail_later(outputs: Tensor, targets: Tensor) -> Tensor:
    """Let the trial step pass."""
    _calls.append(1)
    return F.cross_entropy(outputs, targets) if len(_calls) == 1 else _fail()


def _exit_later(outputs: Tensor, targets: Tensor) -> Tensor:
    """Let the trial step pass."""
    try:
        return _fail_later(outputs, targets)
    except KeyError as error:
        raise SystemExit(SECRET) from error


_calls: list[int] = []


class _Narrow(nn.Module):
    """Takes other inputs than there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


double = _changed(lambda inputs, targets: (inputs.double(), targets))
narrow = replace(tiny, build_model=_Narrow, load_test=lambda _: None)
lossless = replace(tiny, loss=_fail, load_test=lambda _: None)
unreadable = replace(tiny, load_train=_fail_to_load, load_test=lambda _: None)
exits = replace(tiny, loss=_exit_later, load_test=lambda _: None)
huge = replace(tiny, loss=lambda *pair: F.cross_entropy(*pair) + 3e31, load_test=lambda _: None)
later = replace(tiny, loss=_fail_later, load_test=lambda _: None)
narrow_test = replace(narrow, load_test=tiny.load_test)
bad_metric = replace(tiny, metrics={"own": _FailingMetric})

"""Small tasks for tests that start real processes: `--task tests.tiny_task:tiny` on both sides.

`tiny` has a few hundred parameters, BatchNorm among them, and `measured` is `tiny` with metrics of
its own; `big` has 27 MB, so that something can
happen while an update is on the wire. What one process does differently is told by its environment:

    TINY_STEP_S     seconds that every training step takes longer
    TINY_WIDTH      how wide the hidden layer of `tiny` is, as of another version of the task; 16
    TINY_BIG_WIDTH  how wide those of `big` are: 4 * width^2 bytes, the same for all of a run; 2600
    TINY_TRACE      "1": a line `tiny-step N` on standard error after every training step
    TINY_EMPTY      the ids of clients without any examples, as "1,3"
    TINY_BROKEN     the ids of clients whose examples can't be read, as "2"
    TINY_BAD        "pixel": one pixel of this client's data is NaN; "gradient": a finite loss whose
                    gradient isn't

A file NUM_EXAMPLES_FILE in --data-root holds how many examples each client has instead.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedrounds.tasks.task import DataRequest, Examples, Task
from fedrounds.training.metrics import Metric

NUM_FEATURES = 8
NUM_CLASSES = 3
BATCH_SIZE = 8
"""What the tests train with; every client's number of examples is a multiple of it."""

NUM_EXAMPLES_FILE = "num_examples.txt"

_steps: Iterator[int] = count(1)
_losses: Iterator[int] = count()
"""The first loss of a process is that of its trial step: the environment's words are not of it."""


def num_examples_of(client_id: int) -> int:
    """Return how many examples a client has: not the same for all, so that weights matter."""
    return BATCH_SIZE * (4 + client_id % 3)


def _tiny_model() -> nn.Module:
    width = int(os.environ.get("TINY_WIDTH", "16"))
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )


def _big_model() -> nn.Module:
    width = int(os.environ.get("TINY_BIG_WIDTH", "2600"))
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )


def _draw(seed: int, num_examples: int) -> TensorDataset:
    """Return points around one centre a class, `num_examples` of them."""
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_examples,), generator=generator)
    noise = torch.randn(num_examples, NUM_FEATURES, generator=generator)
    return TensorDataset(centres[labels] + 0.5 * noise, labels)


class _Broken(Dataset[tuple[Tensor, ...]]):
    """Examples on a disk that has failed."""

    def __len__(self) -> int:
        return BATCH_SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        raise OSError(f"example {index} can't be read")


def _load_train(request: DataRequest) -> Examples:
    client_id = 0 if request.partition is None else request.partition.index
    if _is_named("TINY_BROKEN", client_id):
        return _Broken()
    num_examples = 0 if _is_named("TINY_EMPTY", client_id) else num_examples_of(client_id)
    if request.data_root is not None and (path := request.data_root / NUM_EXAMPLES_FILE).exists():
        num_examples = int(path.read_text())
    dataset = _draw(1000 + client_id, num_examples)
    if os.environ.get("TINY_BAD") == "pixel":
        dataset.tensors[0][3, 2] = torch.nan
    return dataset


def _is_named(variable: str, client_id: int) -> bool:
    return str(client_id) in os.environ.get(variable, "").split(",")


def _load_test(_: Path | None) -> Examples:
    return _draw(999, 60)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, targets)
    if not torch.is_grad_enabled() or next(_losses) == 0:
        return loss
    if os.environ.get("TINY_TRACE") == "1":
        print(f"tiny-step {next(_steps)}", file=sys.stderr, flush=True)
    time.sleep(float(os.environ.get("TINY_STEP_S", "0")))
    if os.environ.get("TINY_BAD") == "gradient":
        # The root's slope at 0 is infinite: 0 * inf is NaN.
        loss = loss + (outputs * 0).sum().sqrt()
    return loss


def _task(name: str, *, is_big: bool) -> Task:
    return Task(
        name=name,
        build_model=_big_model if is_big else _tiny_model,
        load_train=_load_train,
        load_test=_load_test,
        loss=_loss,
    )


tiny = _task("tiny", is_big=False)
big = _task("big", is_big=True)


def _f1() -> Metric:
    from torchmetrics import F1Score

    return F1Score("multiclass", num_classes=NUM_CLASSES, average="macro")


def _auc() -> Metric:
    from torchmetrics import AUROC

    return AUROC("multiclass", num_classes=NUM_CLASSES)


measured = replace(tiny, name="measured", metrics={"f1": _f1, "auc": _auc})

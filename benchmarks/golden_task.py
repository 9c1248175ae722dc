"""A task with a tiny model for the golden runs: `--task benchmarks.golden_task:blobs`.

The examples of a class are drawn around the centre of the class. Each client has another number of
examples and another mix of classes. `with_local_head` is the same task, but each client keeps its
last layer. What a run needs besides is in the environment of its client process:

    GOLDEN_BAD_CLIENT    number of the client one of whose examples holds a NaN
    GOLDEN_WORSEN_AFTER  number of training steps of the process after which its training makes the
                         loss larger
    GOLDEN_HALT          STEP:PATH, the process makes the empty file PATH at this training step and
                         then does nothing until it is killed
"""

import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedrounds.tasks.task import DataRequest, Task

NUM_FEATURES = 12
NUM_CLASSES = 4
BATCH_SIZE = 8

_BAD_CLIENT = int(os.environ.get("GOLDEN_BAD_CLIENT", "-1"))
_WORSEN_AFTER = int(os.environ.get("GOLDEN_WORSEN_AFTER", str(10**9)))
_HALT_STEP, _, _HALT_PATH = os.environ.get("GOLDEN_HALT", "-1:").partition(":")

_training_steps = itertools.count(1)


def _build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(16, NUM_CLASSES),
    )


def _draw(seed: int, class_weights: Tensor, num_examples: int) -> TensorDataset:
    """Return `num_examples` examples with classes drawn in proportion to `class_weights` [4]."""
    centres = torch.randn(
        NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(class_weights, num_examples, replacement=True, generator=generator)
    noise = torch.randn(num_examples, NUM_FEATURES, generator=generator)
    return TensorDataset(centres[labels] + 0.9 * noise, labels)


def _load_train(request: DataRequest) -> TensorDataset:
    assert request.partition is not None
    client_id = request.partition.index
    class_weights = torch.ones(NUM_CLASSES)
    class_weights[client_id % NUM_CLASSES] = 3.0
    examples = _draw(1000 + client_id, class_weights, BATCH_SIZE * (4 + client_id % 3))
    if client_id == _BAD_CLIENT:
        examples.tensors[0][3, 2] = torch.nan
    return examples


def _load_test(_: Path | None) -> TensorDataset:
    return _draw(999, torch.ones(NUM_CLASSES), 200)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, targets)
    if not torch.is_grad_enabled():
        return loss
    step = next(_training_steps)
    if step == int(_HALT_STEP):
        Path(_HALT_PATH).touch()
        while True:
            time.sleep(60)
    return -loss if step > _WORSEN_AFTER else loss


def _task(name: str, entries: Mapping[str, str]) -> Task:
    return Task(
        name=name,
        build_model=_build_model,
        load_train=_load_train,
        load_test=_load_test,
        loss=_loss,
        num_classes=NUM_CLASSES,
        entries=entries,
    )


blobs = _task("blobs", {})
with_local_head = _task("blobs-with-local-head", {"4.*": "local", "1.running_var": "keep"})

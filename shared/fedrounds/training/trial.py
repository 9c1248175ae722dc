"""A trial step: checks that a task's model, loss and data fit each other, before a run begins.

It leaves no trace: it trains a model of its own, and restores every random stream.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch.utils.data import DataLoader

from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.doctor import TrainingHalted
from fedrounds.nested import to_device
from fedrounds.plugins import naming_task_errors
from fedrounds.tasks.loading import batches_in_order
from fedrounds.tasks.task import Examples, Task, count_examples, has_numbers, validate_example
from fedrounds.training.evaluation import Batches
from fedrounds.training.loop import DoctorContext, train_model
from fedrounds.training.objective import compute_loss_of

_NUM_EXAMPLES = 8
_NUM_FOR_THE_DOCTOR = 64


def try_training_step(task: Task, examples: Examples, *, device: torch.device) -> None:
    """Compute the loss and gradient of the task's model on its first 8 examples.

    If that raises an error, the doctor takes a step on more examples. A failure that it would cure
    or report in a run is no reason not to join. Neither are values that aren't finite, nor a full
    device, since the batches of a run may be smaller.

    Raises:
        OwnCodeFailed: the step raised an error, which is the cause.
        InvalidInput: an example isn't what the task's loss is for.
    """
    what = f"task {task.name!r}: reading the first example"
    with keeping_random_streams(device):
        with naming_task_errors(what):
            validate_first(task, examples)
        if not _goes_well(task, _first(_NUM_EXAMPLES, task, examples), device):
            # The doctor's step raises the error again, unless the doctor can deal with it.
            _step_with_doctor(task, _first(_NUM_FOR_THE_DOCTOR, task, examples), device)


def validate_first(task: Task, examples: Examples) -> None:
    """Refuse a data set whose first example can't be put into a batch that the task can train on.

    Only map-style data sets are looked at, and only if torch itself makes the batches.

    Raises:
        InvalidInput: see `validate_example`.
    """
    if task.collate is None and not isinstance(examples, DataLoader) and has_numbers(examples):
        validate_example(task, examples[0])


def _first(num: int, task: Task, examples: Examples) -> Batches:
    """Return the first examples, as many as there are, as one batch; a DataLoader's first batch."""
    if has_numbers(examples):
        numbers = range(min(num, count_examples(task, examples, loaded_by="load_train")))
        return batches_in_order(task, examples, batch_size=num, numbers=numbers)
    return list(itertools.islice(batches_in_order(task, examples, batch_size=num), 1))


def _goes_well(task: Task, batches: Batches, device: torch.device) -> bool:
    try:
        batch = to_device(next(iter(batches)), device)
        model = task.build_model().to(device).train()
        loss, _ = compute_loss_of(task.loss, task.training_step)(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        return True
    except (Exception, SystemExit):
        return False
    return True


def _step_with_doctor(task: Task, batches: Batches, device: torch.device) -> None:
    what = f"task {task.name!r}: a trial step before the run"
    with suppress(TrainingHalted), naming_task_errors(what):
        train_model(
            task.build_model(),
            batches,
            epochs=1,
            device=device,
            loss=task.loss,
            training_step=task.training_step,
            doctor=DoctorSettings(),
            doctor_context=DoctorContext(num_classes=task.num_classes),
        )


@contextmanager
def keeping_random_streams(device: torch.device) -> Iterator[None]:
    """Restore every global random stream after this block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)

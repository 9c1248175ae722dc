"""What a client holds out: never trained on, and what the global model is measured on."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import AUROC, F1Score

from fedclient.progress import ProgressReporter
from fedclient.state import ClientState
from fedclient.training import LocalSettings, OrderInputs, train_order
from fedrounds.data import set_aside
from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.tasks.task import Task
from fedrounds.tensors.codec import encode_state
from fedrounds.training.evaluation import evaluate
from fedrounds.training.metrics import make_metrics, measurement_sizes, measurements_of
from fedrounds.types import ClientUpdate, Counters, Incident, WorkOrder
from tests.factories import make_order

NUM_EXAMPLES = 40
EPOCHS = 2


class WatchedExamples(Dataset[tuple[Tensor, ...]]):
    """Points of two classes; `seen` are the numbers of those that were read, in order."""

    def __init__(self, num_examples: int = NUM_EXAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.seen: list[int] = []
        self._points = torch.randn(num_examples, 3, generator=generator)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.seen.append(index)
        return self._points[index], (self._points[index].sum() > 0).long()


def build() -> nn.Module:
    """Return a model that answers something."""
    return nn.Linear(3, 2)


TASK = Task(
    name="watched",
    build_model=build,
    load_train=lambda request: WatchedExamples(),
    load_test=lambda root: None,
    loss=F.cross_entropy,
    metrics={
        "f1": lambda: F1Score("multiclass", num_classes=2, average="macro"),
        "auc": lambda: AUROC("multiclass", num_classes=2),
    },
)


def work_on(
    folder: Path, order: WorkOrder, examples: WatchedExamples
) -> tuple[ClientUpdate, Counters]:
    """Do an order's work; returns the update and how far the server heard it was."""
    torch.manual_seed(0)
    (folder / "global").write_bytes(encode_state(build().state_dict()))

    def report(_: Counters, __: Sequence[tuple[int, Incident]]) -> None:
        return None

    progress = ProgressReporter(report, stop=threading.Event())
    update, _ = train_order(
        OrderInputs(
            order=order,
            task=TASK,
            examples=examples,
            global_model=folder / "global",
            state=ClientState(),
        ),
        LocalSettings(device=torch.device("cpu"), doctor=DoctorSettings()),
        progress=progress,
        payload=folder / "payload",
        on_diagnosis=lambda _: None,
    )
    return update, progress.counters


def order_of(*, holdout: float, seed: int = 1) -> WorkOrder:
    """Return an order that has the client say how good the global model is."""
    order = make_order(client_id=7)
    training = replace(order.training, epochs=EPOCHS, batch_size=8)
    return replace(order, evaluate=True, holdout=holdout, seed=seed, training=training)


def test_what_is_held_out_is_measured_and_never_trained_on(tmp_path: Path) -> None:
    """A quarter of 40: the same ten in orders of other seeds, read once, before training begins."""
    held_out = set()
    for seed in (1, 2):
        examples = WatchedExamples()
        update, counters = work_on(tmp_path, order_of(holdout=0.25, seed=seed), examples)
        measured, trained = examples.seen[:10], examples.seen[10:]
        assert not set(measured) & set(trained)
        assert sorted(measured + trained[: len(trained) // EPOCHS]) == list(range(NUM_EXAMPLES))
        held_out.add(tuple(measured))
        assert (update.num_examples, update.metrics["global_examples"]) == (30, 10)
        # One batch of 10 to measure, and twice 4 of up to 8 to train.
        assert (counters.batches, counters.batches_total) == (9, 9)
        assert (counters.steps, counters.steps_total) == (8, 8)
    assert len(held_out) == 1


def test_the_number_is_that_of_the_global_model_on_them(tmp_path: Path) -> None:
    """As evaluate has it for the model as it came, on those examples alone; 0 means all."""
    torch.manual_seed(0)
    model = build()
    examples = WatchedExamples()
    for holdout, measured in ((0.25, None), (0.0, range(NUM_EXAMPLES))):
        update, _ = work_on(tmp_path, order_of(holdout=holdout), examples)
        numbers = examples.seen[:10] if measured is None else measured
        points = [examples[number] for number in numbers]
        batch = (
            torch.stack([inputs for inputs, _ in points]),
            torch.stack([label for _, label in points]),
        )
        expected = evaluate(model, [batch])
        assert update.metrics["global_accuracy"] == pytest.approx(expected.accuracy)
        assert update.metrics["global_loss"] == pytest.approx(expected.loss)
        metrics = make_metrics(TASK.metrics)
        for metric in metrics.values():
            metric.update(model(batch[0]), batch[1])
        assert update.measurements == measurements_of(metrics)
        sizes = {name: len(values) for name, values in update.measurements.items()}
        assert sizes == measurement_sizes(TASK.metrics)


def test_a_client_with_one_example_trains_on_it_and_says_nothing(tmp_path: Path) -> None:
    """Two are enough to hold one out."""
    alone, _ = work_on(tmp_path, order_of(holdout=0.5), WatchedExamples(1))
    assert alone.num_examples == 1
    assert "global_accuracy" not in alone.metrics
    two, _ = work_on(tmp_path, order_of(holdout=0.01), WatchedExamples(2))
    assert (two.num_examples, two.metrics["global_examples"]) == (1, 1)


def test_clients_hold_out_others() -> None:
    """Each by its own id: clients with as many examples don't hold out the same numbers."""
    kept = {tuple(set_aside(40, share=0.25, seed=seed)[1]) for seed in range(5)}
    assert len(kept) == 5

"""What can be asked of a training: its order's settings, what is measured, what data may hold."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedrounds.data.augmentation import AUGMENTATIONS
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import InvalidInput
from fedrounds.tasks.models import INITIALISATIONS
from fedrounds.tasks.task import Task, inspect_examples
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import Callbacks, StepProgress, incident_of, train_model
from fedrounds.training.optimizers import OPTIMIZERS, SCHEDULES
from fedrounds.types import (
    AugmentationName,
    ClientAlgorithmConfig,
    InitialisationName,
    OptimizerName,
    Schedule,
    ScheduleName,
    TrainingConfig,
    WorkOrder,
)
from fedrounds.wire.messages import order_message, order_of
from fedserver.models.evaluation import Evaluator
from fedserver.settings import RUN_SETTINGS, ServerSettings, TrainingSettings


def make_task(**options: object) -> Task:
    """Return a task of two classes, with `options` in place of its fields."""
    fields: dict[str, object] = {
        "name": "small",
        "build_model": lambda: nn.Linear(3, 2),
        "load_train": lambda _: TensorDataset(),
        "load_test": lambda _: None,
        "loss": F.cross_entropy,
    }
    return Task(**(fields | options))  # type: ignore[arg-type]  # each is what its name says


# ---- from the server's settings to the client's training


def test_settings_accept_the_names_there_are() -> None:
    """The settings list names without importing torch; they are those of the tables."""
    assert get_args(OptimizerName) == tuple(OPTIMIZERS)
    assert get_args(ScheduleName) == SCHEDULES
    assert get_args(AugmentationName) == ("none", *AUGMENTATIONS)
    assert get_args(InitialisationName) == ("default", *INITIALISATIONS)


def test_an_order_arrives_as_it_was_sent() -> None:
    """With every field of its training other than its default."""
    training = TrainingConfig(
        epochs=3,
        batch_size=7,
        optimizer="adamw",
        lr=0.25,
        momentum=0.5,
        weight_decay=0.125,
        clip_norm=2.0,
        schedule=Schedule(
            name="cosine",
            warmup_epochs=1.5,
            decay_epochs=4,
            decay=0.75,
            first_epoch=6,
            total_epochs=30,
        ),
        augmentation="shift",
        client_algorithm=ClientAlgorithmConfig(name="fedprox", parameters={"mu": 0.5}),
        work_deadline_s=1.5,
    )
    for changed, default in (
        (training, TrainingConfig()),
        (training.schedule, Schedule()),
    ):
        assert all(vars(changed)[name] != value for name, value in vars(default).items())
    for sent in (training, TrainingConfig()):
        order = WorkOrder(
            order_id="o",
            client_id=1,
            round_number=2,
            attempt=3,
            sections=(),
            training=sent,
            seed=5,
            last_counted_order_id="p",
            evaluate=True,
        )
        assert order_of(order_message(order)) == order


def test_an_order_of_an_older_server_trains_at_one_step_size() -> None:
    """Its message has neither schedule nor augmentation."""
    order = WorkOrder(
        order_id="o",
        client_id=1,
        round_number=1,
        attempt=1,
        sections=(),
        training=TrainingConfig(schedule=Schedule(name="cosine"), augmentation="shift"),
        seed=1,
    )
    message = order_message(order)
    message.training.ClearField("schedule")
    message.training.ClearField("augmentation")
    assert order_of(message).training == TrainingConfig()


def test_rounds_share_one_schedule_or_each_begins_anew() -> None:
    """Round 3 of rounds of 2 epochs begins at epoch 4 of the run's 20."""
    over_run = ServerSettings(epochs=2, rounds=10, schedule="cosine")
    assert over_run.training_in(3).schedule == Schedule(
        name="cosine", first_epoch=4, total_epochs=20
    )
    over_round = ServerSettings(epochs=2, rounds=10, schedule="cosine", schedule_over="round")
    assert over_round.training_in(3).schedule == Schedule(name="cosine", total_epochs=2)


def test_a_warm_up_longer_than_its_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--warmup-epochs 2 is all of the 2 epochs of a round"):
        ServerSettings(epochs=2, warmup_epochs=2, schedule_over="round")
    ServerSettings(epochs=2, warmup_epochs=2, rounds=2)


def test_how_clients_train_makes_a_run_a_run() -> None:
    own = set(TrainingSettings.__annotations__)
    assert own <= set(RUN_SETTINGS)
    assert "init" in RUN_SETTINGS


# ---- what is measured on the way


def test_the_largest_gradient_is_reported_every_few_steps() -> None:
    """The gradient of sum(w x) is x: its largest absolute value is 5, before clipping to 1."""
    model = nn.Linear(2, 2, bias=False)
    batch = (torch.tensor([[3.0, -5.0]]), torch.tensor([0]))
    seen: list[StepProgress] = []
    train_model(
        model,
        [batch] * 3,
        epochs=2,
        lr=1e-6,
        clip_norm=1.0,
        loss=lambda outputs, _: outputs[:, 0].sum(),
        callbacks=Callbacks(on_step=seen.append, gradient_every=2),
    )
    reported = [progress.largest_gradient for progress in seen]
    assert reported[::2] == [None] * 3
    assert reported[1::2] == pytest.approx([5.0] * 3, rel=1e-6)
    assert seen[0].grad_norm == pytest.approx(math.hypot(3, 5))


def test_an_incident_tells_the_step_size_of_its_step() -> None:
    """With lr 1 and decay 0.5 an epoch, the bad third epoch trains at 0.25."""
    good = (torch.zeros(2, 3), torch.tensor([0, 1]))
    bad = (torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    passes = iter([[good], [good], [bad]])

    class Changing:
        def __len__(self) -> int:
            return 1

        def __iter__(self) -> object:
            return iter(next(passes))

    with pytest.raises(TrainingHalted, match=r"step 3 \(epoch 3, batch 1, lr 0.25") as caught:
        train_model(
            nn.Linear(3, 2),
            Changing(),  # type: ignore[arg-type]  # an iterator of batches it is
            epochs=3,
            lr=1.0,
            schedule=Schedule(name="step", decay_epochs=1, decay=0.5),
        )
    assert incident_of(caught.value.diagnosis).detail["lr"] == 0.25


def test_the_loss_is_a_mean_over_examples() -> None:
    """Batches of 3 and 1 examples: the mean is that of all four, not of two batches."""
    inputs = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 10.0]])
    targets = torch.tensor([1, 1, 0, 1])
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    evaluation = evaluate(nn.Identity(), batches)
    assert evaluation.loss == pytest.approx(F.cross_entropy(inputs, targets).item())


@pytest.mark.parametrize("name", ["loss", "accuracy", "client_id", "top 5", ""])
def test_a_metric_cant_take_a_name_that_is_taken(name: str) -> None:
    with pytest.raises(InvalidInput, match="a metric can't be called"):
        make_task(metrics={name: torchmetrics.MeanSquaredError})


# ---- what data may hold


def test_a_label_that_is_no_class_is_named() -> None:
    inputs = torch.zeros(4, 3)
    for bad in (2, -1):
        examples = TensorDataset(inputs, torch.tensor([0, 1, bad, bad]))
        with pytest.raises(InvalidInput, match=rf"example 2 \(from 0\) has the label {bad}; .* 1"):
            inspect_examples(make_task(num_classes=2), examples)
        assert inspect_examples(make_task(), examples) == []
    sequences = TensorDataset(torch.zeros(2, 4), torch.tensor([[0, 1, 1, 0], [0, 0, 7, 0]]))
    with pytest.raises(InvalidInput, match=r"example 1 .* has the label \[0, 0, 7, 0\]"):
        inspect_examples(make_task(num_classes=2), sequences)


def test_examples_without_targets_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"is \(input, target\), but the data set has 1 tensors"):
        inspect_examples(make_task(), TensorDataset(torch.zeros(2, 4)))


def test_a_label_that_losses_leave_out_is_no_mistake() -> None:
    examples = TensorDataset(torch.zeros(2, 4), torch.tensor([[0, 1], [-100, 0]]))
    assert inspect_examples(make_task(num_classes=2), examples) == []


def test_examples_of_a_training_step_are_inspected_whatever_their_number_of_tensors() -> None:
    """The labels are the tensor most of whose numbers are classes, also before the weights."""
    inputs, weights = torch.zeros(3, 2), torch.ones(3)
    weights[2] = math.nan
    numbers, labels = torch.tensor([7, 8, 9]), torch.tensor([0, 1, 1])
    task = make_task(num_classes=2, loss=None, training_step=lambda model, batch: None)
    assert inspect_examples(task, TensorDataset(inputs, labels, numbers, weights)) == [2]
    assert inspect_examples(task, TensorDataset(inputs)) == []
    wrong = torch.tensor([0, 1, 2])
    with pytest.raises(InvalidInput, match=r"example 2 \(from 0\) has the label 2"):
        inspect_examples(task, TensorDataset(inputs, wrong, numbers, weights))


def test_inputs_that_arent_finite_are_counted_where_they_shouldnt_be() -> None:
    """Infinities that cancel in a sum are detected all the same; large sums are no false alarm."""
    inputs = torch.zeros(5, 2, 2)
    inputs[1, 0, 1] = math.nan
    inputs[3, 1] = torch.tensor([math.inf, -math.inf])
    examples = TensorDataset(inputs, torch.zeros(5, dtype=torch.int64))
    assert inspect_examples(make_task(), examples) == [1, 3]
    assert inspect_examples(make_task(finite_inputs=False), examples) == []
    large = TensorDataset(torch.full((5, 2), 3e38), torch.zeros(5, dtype=torch.int64))
    assert inspect_examples(make_task(num_classes=2), large) == []


def test_a_server_doesnt_start_with_a_held_out_set_that_isnt_finite() -> None:
    """Every evaluation would be NaN, and look like a collapse of the model."""
    held_out = TensorDataset(torch.tensor([[0.0] * 3, [math.nan] * 3]), torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match=r"held-out example 1 \(from 0\) holds a NaN"):
        Evaluator(make_task(load_test=lambda _: held_out), nn.Linear(3, 2), data_root=None)


def test_a_server_doesnt_start_with_an_empty_held_out_set() -> None:
    """None is the way to say that there is none."""
    nothing = TensorDataset(torch.zeros(0, 3), torch.zeros(0).long())
    with pytest.raises(InvalidInput, match=r"held-out set is empty; .* load_test return None"):
        Evaluator(make_task(load_test=lambda _: nothing), nn.Linear(3, 2), data_root=None)


def test_data_of_other_kinds_is_taken_as_it_is() -> None:
    class Own(Dataset[tuple[Tensor, ...]]):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            raise AssertionError("looked at")

    assert inspect_examples(make_task(num_classes=2), Own()) == []
    whole_numbers = TensorDataset(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3).long())
    assert inspect_examples(make_task(num_classes=2), whole_numbers) == []
    nothing = TensorDataset(torch.zeros(0, 2), torch.zeros(0).long())
    assert inspect_examples(make_task(num_classes=2), nothing) == []

"""What is written into a training between two steps is known, and named where it does harm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Cause, Diagnosis
from fedrounds.doctor import Doctor
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.outside import OutsideWrites, Written
from fedrounds.doctor.plain import Live
from fedrounds.doctor.stepping import TrainingState

WRITTEN_AT = 45


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the outputs."""
    assert isinstance(batch, tuple)
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1]), outputs


def make_training() -> TrainingState:
    """Return a training by Adam that has taken one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return TrainingState(
        model=model,
        optimizer=optimizer,
        compute_loss=compute_loss,
        learning=list(model.parameters()),
    )


def write(training: TrainingState, part: Written | None) -> None:
    """Scale a part of a training as a callback would."""
    with torch.no_grad():
        if part is Written.WEIGHTS:
            for weight in training.learning:
                weight.mul_(-300.0)
        elif part is Written.OPTIMIZER_STATE:
            for state in training.optimizer.state.values():
                state["exp_avg"].mul_(1e5)


@pytest.mark.parametrize("part", [None, Written.WEIGHTS, Written.OPTIMIZER_STATE])
def test_a_write_between_two_steps_is_known(part: Written | None) -> None:
    training = make_training()
    writes = OutsideWrites()
    for _ in range(2):
        writes.note(training)
        write(training, part)
        assert writes.since_noted(training) == ({part} if part else set())


def test_a_state_that_was_loaded_is_another() -> None:
    training = make_training()
    writes = OutsideWrites()
    writes.note(training)
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert writes.since_noted(training) == {Written.OPTIMIZER_STATE}


def test_what_is_written_into_a_state_that_was_put_back_is_known() -> None:
    """As the doctor does it: the same dictionary, with other tensors in it."""
    training, writes = make_training(), OutsideWrites()
    writes.note(training)
    kept = Live(training)
    kept.put_back()
    writes.note(training)
    assert writes.since_noted(training) == set()
    write(training, Written.OPTIMIZER_STATE)
    assert writes.since_noted(training) == {Written.OPTIMIZER_STATE}


def diagnoses_of(part: Written | None) -> list[Diagnosis]:
    """Return what the doctor says of a training that is written into once."""
    training = make_training()
    diagnoses: list[Diagnosis] = []
    doctor = Doctor(
        training.model,
        training.optimizer,
        compute_loss,
        num_classes=3,
        on_diagnosis=diagnoses.append,
    )
    generator = torch.Generator().manual_seed(1)
    separating = torch.randn(8, 3, generator=generator)
    for step in range(1, 81):
        inputs = torch.randn(16, 8, generator=generator)
        if step == WRITTEN_AT:
            write(training, part)
        doctor.step((inputs, (inputs @ separating).argmax(1)))
    doctor.finish()
    return diagnoses


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (Written.WEIGHTS, Cause.NOT_REPRODUCIBLE),
        (Written.OPTIMIZER_STATE, Cause.OPTIMIZER_STATE),
    ],
)
def test_a_write_that_does_harm_is_the_cause(part: Written, cause: Cause) -> None:
    diagnoses = diagnoses_of(part)
    assert [(diagnosis.cause, diagnosis.step) for diagnosis in diagnoses] == [(cause, WRITTEN_AT)]
    assert diagnoses[0].remedy.is_working


def test_without_a_write_nothing_is_diagnosed() -> None:
    assert diagnoses_of(None) == []

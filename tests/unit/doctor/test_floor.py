"""What nothing heals ends no worse than a plain loop, or a loop that skips its bad steps."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.text import is_cured, verdict
from fedrounds.diagnosis.values import Cause, Diagnosis, DoctorSettings, Symptom
from fedrounds.doctor import Doctor, TrainingHalted
from fedrounds.doctor.batches import Batch

NUM_STEPS = 40
Loss = Callable[[nn.Module, Batch], Tensor]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches of two classes."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_STEPS, 8, 4, generator=generator)
    return [(features, (features[:, 0] > 0).long()) for features in inputs]


class Spoiling(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(_: object, inputs: Tensor) -> Tensor:  # noqa: D102  # torch's own signature
        return inputs.clone()

    @staticmethod
    def backward(_: object, *gradients: Tensor) -> Tensor:  # noqa: D102  # torch's own signature
        return gradients[0] * math.nan


class Spoiled(nn.Sequential):
    """A network whose gradient is NaN in two steps of three, for no reason to be seen."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [n, 2]."""
        outputs: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        is_bad = self.training and float(inputs[0, 1]) < 0.5
        return Spoiling.apply(outputs) if is_bad else outputs


def make_model(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    """Return a small network."""
    torch.manual_seed(3)
    return kind(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def doctored(
    model: nn.Module, loss: Loss, settings: DoctorSettings | None = None
) -> tuple[nn.Module, Doctor]:
    """Return a model trained with a doctor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    doctor = Doctor(model, optimizer, loss, num_classes=2, settings=settings)
    for batch in batches():
        doctor.step(batch)
    doctor.finish()
    return model, doctor


def skipping(model: nn.Module, loss: Loss) -> nn.Module:
    """Return a model trained by a loop that doesn't take steps with a bad gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        if all(
            parameter.grad is not None and parameter.grad.isfinite().all()
            for parameter in model.parameters()
        ):
            optimizer.step()
    return model


def loss_of(model: nn.Module) -> float:
    """Return the cross-entropy over all batches."""
    inputs = torch.cat([features for features, _ in batches()])
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()))


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy."""
    assert isinstance(batch, tuple)
    return F.cross_entropy(model(batch[0]), batch[1])


def with_infinite_constant(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss that is infinite in each step and has the gradient of a finite one."""
    return compute_loss(model, batch) + torch.tensor(math.inf)


@pytest.mark.parametrize(
    ("kind", "loss"), [(nn.Sequential, with_infinite_constant), (Spoiled, compute_loss)]
)
def test_what_nothing_heals_goes_on_as_a_loop_that_skips_bad_steps(
    kind: type[nn.Sequential], loss: Loss
) -> None:
    """A few steps are spent on finding out; what is learned then is about as much."""
    model, doctor = doctored(make_model(kind), loss)
    assert doctor.diagnoses
    assert not is_cured(doctor.diagnoses[-1])
    initial, skipped = loss_of(make_model()), loss_of(skipping(make_model(kind), loss))
    assert skipped < 0.9 * initial
    assert loss_of(model) < skipped + 0.3 * (initial - skipped)


def test_who_asks_for_a_stop_gets_one() -> None:
    settings = DoctorSettings(goes_on_beyond=False)
    with pytest.raises(TrainingHalted):
        doctored(make_model(), with_infinite_constant, settings)


def test_an_examination_ends_when_its_time_is_up() -> None:
    """Then the cause is unknown, and training goes on."""
    settings = DoctorSettings(max_diagnosis_s=0.0)
    _, doctor = doctored(make_model(Spoiled), compute_loss, settings)
    assert {diagnosis.cause for diagnosis in doctor.diagnoses} == {Cause.UNKNOWN}
    assert all(diagnosis.num_replayed_steps == 0 for diagnosis in doctor.diagnoses)


def test_a_dead_network_is_diagnosed_even_if_nothing_helps() -> None:
    """Dropout of everything: no weight has a gradient, whatever the weights are."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(1.0), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    doctor = Doctor(model, optimizer, compute_loss, num_classes=2)
    for batch in batches():
        doctor.step(batch)
    doctor.finish()
    (diagnosis,) = doctor.diagnoses
    assert (diagnosis.symptom, diagnosis.cause) == (Symptom.DEAD_NETWORK, Cause.UNKNOWN)


@pytest.mark.parametrize(
    ("scale", "asks_to_stop", "stops"),
    [
        (0.0, False, False),
        (0.0, True, True),
        (1e25, False, False),
        (1e25, True, True),
        # There is nothing to go on from.
        (math.nan, False, True),
    ],
)
def test_the_diagnosis_of_a_bad_start_says_what_was_done(
    scale: float, asks_to_stop: bool, stops: bool
) -> None:
    """In an own loop training goes on from it if that can be, and the verdict says so."""
    model = make_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    settings = DoctorSettings(stops_at_bad_start=asks_to_stop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    diagnoses: list[Diagnosis] = []
    doctor = Doctor(
        model,
        optimizer,
        compute_loss,
        num_classes=2,
        settings=settings,
        on_diagnosis=diagnoses.append,
    )
    is_halted = False
    try:
        for batch in batches():
            doctor.step(batch)
    except TrainingHalted:
        is_halted = True
    assert (is_halted, diagnoses[0].cause) == (stops, Cause.BAD_INITIALISATION)
    assert ("training stopped" if stops else "training went on") in verdict(diagnoses[0])
    assert not is_cured(diagnoses[0])

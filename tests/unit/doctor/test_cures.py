"""The doctor names step and cause of planted faults, cures them, and leaves health alone."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    ExperimentName,
    Oddity,
    RemedyKind,
    RemedyPolicy,
    StepPhase,
    Symptom,
)
from fedrounds.doctor import Doctor, DoctorSettings, TrainingHalted
from fedrounds.doctor.batches import Batch

NUM_STEPS = 48
MARK = 7.0
"""An input that the batches hold by no chance."""
Spoil = Callable[[int, Tensor, Tensor], None]


def make_model(seed: int = 0) -> nn.Sequential:
    """Return a perceptron of eight features and three classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def make_batches(num: int = NUM_STEPS, *, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return batches whose classes a line can tell apart."""
    generator = torch.Generator().manual_seed(1)
    separating = torch.randn(8, 3, generator=generator)
    inputs = torch.randn(num, size, 8, generator=generator)
    return [(features, (features @ separating).argmax(1)) for features in inputs]


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the outputs."""
    assert isinstance(batch, tuple)
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1]), outputs


class Trained:
    """A training under the doctor, with the losses of its steps."""

    def __init__(
        self,
        *,
        spoil: Spoil = lambda step, inputs, labels: None,
        lr: float = 0.1,
        settings: DoctorSettings | None = None,
        model: nn.Module | None = None,
        loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] = compute_loss,
        is_initial: bool = True,
        on_diagnosis: Callable[[Diagnosis], None] = lambda _: None,
    ) -> None:
        self.model = make_model() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.doctor = Doctor(
            self.model,
            self.optimizer,
            loss,
            settings=settings,
            num_classes=3,
            is_initial=is_initial,
            on_diagnosis=on_diagnosis,
        )
        self.losses: list[float] = []
        torch.manual_seed(7)
        for step, (inputs, labels) in enumerate(make_batches(), start=1):
            spoil(step, inputs, labels)
            numbers = range(100 * step, 100 * step + len(inputs))
            report = self.doctor.step((inputs, labels), indices=numbers)
            self.losses.append(report.loss)
        self.doctor.finish()

    @property
    def diagnosis(self) -> Diagnosis:
        """The only one."""
        (only,) = self.doctor.diagnoses
        return only

    def weights(self) -> list[Tensor]:
        """Return the trained parameters."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def plain_weights() -> list[Tensor]:
    """Return what a plain loop learns from the same batches."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(7)
    for batch in make_batches():
        optimizer.zero_grad()
        compute_loss(model, batch)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("is_armed", [True, False])
def test_a_healthy_training_is_bit_for_bit_that_of_a_plain_loop(is_armed: bool) -> None:
    trained = Trained(settings=DoctorSettings(is_armed=is_armed))
    assert trained.doctor.diagnoses == []
    for mine, plain in zip(trained.weights(), plain_weights(), strict=True):
        assert torch.equal(mine, plain)


def spoil_input(value: float, *, at_step: int = 20, position: int = 5) -> Spoil:
    """Put a value into one input of one sample."""

    def spoil(step: int, inputs: Tensor, labels: Tensor) -> None:
        if step == at_step:
            inputs[position, 3] = value

    return spoil


def test_a_bad_sample_that_did_no_harm_before_makes_the_next_bad_sample_no_less_odd() -> None:
    """The first has the label that torch's loss passes over, so nothing is learned from it."""

    def spoil(step: int, inputs: Tensor, labels: Tensor) -> None:
        if step == 18:
            inputs[2, 3] = 1e20
            labels[2] = -100
        if step == 22:
            # Whatever the answer is, it is wrong for two of the three.
            inputs[4:7, 3] = 1e20
            labels[4:7] = torch.arange(3)

    diagnosis = Trained(spoil=spoil).diagnosis
    assert (diagnosis.cause, diagnosis.step) == (Cause.BAD_DATA, 22)
    assert {sample.oddity for sample in diagnosis.samples} == {Oddity.OUTLIER}
    assert diagnosis.remedy.kind is RemedyKind.DROP_SAMPLES


@pytest.mark.parametrize(
    ("value", "oddity"),
    [
        (math.nan, Oddity.NAN),
        (math.inf, Oddity.INFINITY),
        (-1e20, Oddity.OUTLIER),
        (-1e7, Oddity.OUTLIER),
    ],
)
def test_a_bad_sample_is_named_left_out_and_training_goes_on(value: float, oddity: Oddity) -> None:
    trained = Trained(spoil=spoil_input(value))
    diagnosis = trained.diagnosis
    assert (diagnosis.cause, diagnosis.step, diagnosis.batch) == (Cause.BAD_DATA, 20, 20)
    assert [(sample.position, sample.index, sample.oddity) for sample in diagnosis.samples] == [
        (5, 2005, oddity)
    ]
    assert diagnosis.remedy.kind is RemedyKind.DROP_SAMPLES
    assert diagnosis.remedy.is_working
    outcomes = {experiment.name: experiment.is_healed for experiment in diagnosis.experiments}
    assert outcomes[ExperimentName.UNCHANGED] is False
    assert outcomes[ExperimentName.WITHOUT_SAMPLES] is True
    # A finite loss is watched for a while before anything is done.
    assert max(trained.losses[-3:]) < trained.losses[0]
    assert all(bool(weight.isfinite().all()) for weight in trained.weights())


def test_a_lower_rate_or_clipping_that_also_heals_is_only_contributing() -> None:
    """An input of -1e7 is bad data, though the step also goes well when its gradient is clipped."""
    diagnosis = Trained(spoil=spoil_input(-1e7)).diagnosis
    assert diagnosis.cause is Cause.BAD_DATA
    assert ExperimentName.CLIPPED_GRADIENT in diagnosis.contributing


def test_a_label_out_of_range_is_found_before_it_does_harm() -> None:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> None:
        if step in (9, 30):
            labels[2] = 3

    diagnosis = Trained(spoil=spoil).diagnosis
    assert (diagnosis.symptom, diagnosis.cause) == (Symptom.LABEL_OUT_OF_RANGE, Cause.BAD_LABEL)
    assert [(sample.position, sample.oddity) for sample in diagnosis.samples] == [
        (2, Oddity.LABEL_OUT_OF_RANGE)
    ]


@pytest.mark.parametrize("lr", [30.0, 1e6])
def test_a_rate_that_is_too_high_is_lowered(lr: float) -> None:
    trained = Trained(lr=lr)
    assert {diagnosis.cause for diagnosis in trained.doctor.diagnoses} == {Cause.LEARNING_RATE}
    assert trained.doctor.diagnoses[0].remedy.kind is RemedyKind.LOWER_RATE
    # From the last good state on it learns: the last ten losses are below that of guessing.
    assert sum(trained.losses[-10:]) / 10 < math.log(3)


def test_weights_that_nobody_initialises_so_are_named_and_not_cured() -> None:
    """A client may not draw other weights than it was given: it stops and says so.

    In a loop of one's own nobody sends others: the diagnosis says so, and training goes on.
    """
    for is_initial, cause in ((True, Cause.BAD_INITIALISATION), (False, Cause.RECEIVED_MODEL)):
        with pytest.raises(TrainingHalted) as caught:
            Trained(
                model=_overgrown(),
                is_initial=is_initial,
                settings=DoctorSettings(stops_at_bad_start=True),
            )
        assert caught.value.diagnosis.cause is cause
        assert caught.value.diagnosis.remedy.kind is RemedyKind.NONE
        trained = Trained(model=_overgrown(), is_initial=is_initial)
        assert trained.doctor.diagnoses[0].cause is cause
        assert trained.doctor.diagnoses[0].remedy.kind is RemedyKind.NONE
        assert all(bool(parameter.isfinite().all()) for parameter in trained.model.parameters())


def _overgrown() -> nn.Module:
    """Return a model whose weights are a thousand times as large as usual."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000)
    return model


def test_a_loss_that_isnt_defined_everywhere_is_guarded() -> None:
    """log(softmax) is -inf where the softmax is 0; its stable form is the cross-entropy.

    Targets that the outputs are to be far from: a gap of 120 makes the softmax 0 in float32.
    """

    def naive(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        outputs = model(batch[0])
        # Where the first input is large the true class is pushed far down.
        far = (batch[0][:, 0] > 2).float()[:, None]
        outputs = outputs - 120 * far * F.one_hot(batch[1], 3)
        chosen = outputs.softmax(1).gather(1, batch[1][:, None])
        return -chosen.log().mean(), outputs

    trained = Trained(loss=naive, lr=1e-4)
    diagnosis = trained.doctor.diagnoses[0]
    assert (diagnosis.cause, diagnosis.origin.phase) == (Cause.LOSS_FUNCTION, StepPhase.LOSS)
    assert diagnosis.origin.operation == "log"
    assert diagnosis.remedy.kind is RemedyKind.GUARD_LOSS
    assert math.isfinite(trained.losses[-1])


def test_a_gradient_that_nobody_measured_is_placed_in_its_step() -> None:
    """At step 21 the root of 0 has the value 0 and an infinite slope; step 22 shows it."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        value, outputs = compute_loss(model, batch)
        assert isinstance(batch, tuple)
        if batch[0][0, 0] == MARK:
            value = value + (outputs - outputs.detach()).sqrt().mean()
        return value, outputs

    diagnosis = Trained(spoil=mark(21), loss=loss).diagnosis
    assert (diagnosis.step, diagnosis.noticed_at_step) == (21, 22)
    assert (diagnosis.symptom, diagnosis.cause) == (
        Symptom.NON_FINITE_GRADIENT,
        Cause.LOSS_FUNCTION,
    )
    assert diagnosis.origin.phase is StepPhase.BACKWARD


def test_a_guarded_loss_without_a_gradient_is_left_to_itself() -> None:
    """The logarithm of a negative number: guarded it is finite, and the same for all weights.

    Nothing helps that, so nothing more is done about it, and the diagnosis says so.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        outputs = model(batch[0])
        return 20 + torch.log(-outputs.abs().sum()), outputs

    diagnosis, dead = Trained(loss=loss).doctor.diagnoses
    assert (diagnosis.symptom, diagnosis.cause) == (Symptom.NON_FINITE_LOSS, Cause.LOSS_FUNCTION)
    assert diagnosis.remedy.kind is RemedyKind.GUARD_LOSS
    assert (dead.symptom, dead.cause) == (Symptom.DEAD_NETWORK, Cause.UNKNOWN)


def test_a_loss_without_a_value_for_few_samples_is_blamed_on_the_samples() -> None:
    """A logarithm of 0 from the batch alone; after eight such samples it is the loss's matter."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        value, outputs = compute_loss(model, batch)
        assert isinstance(batch, tuple)
        return value + 1e-3 * (batch[0][:, 0] - MARK).abs().log().square().mean(), outputs

    *few, last = Trained(spoil=mark(*range(2, 12)), loss=loss).doctor.diagnoses
    assert {
        (diagnosis.cause, diagnosis.remedy.kind, diagnosis.num_samples) for diagnosis in few
    } == {(Cause.BAD_DATA, RemedyKind.DROP_SAMPLES, 1)}
    assert (len(few), last.cause) == (8, Cause.LOSS_FUNCTION)


def test_a_loss_that_differentiates_by_itself_is_examined_as_any_other() -> None:
    """A penalty on the gradient with respect to the inputs; one input of step 20 is bad."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        inputs = batch[0].detach().clone().requires_grad_()
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        penalty = 1e-3 * (slope / (inputs - MARK)).square().mean()
        return F.cross_entropy(outputs, batch[1]) + penalty, outputs

    diagnosis = Trained(spoil=mark(20), loss=loss).diagnosis
    assert (diagnosis.step, diagnosis.cause, diagnosis.num_samples) == (20, Cause.BAD_DATA, 1)
    assert diagnosis.remedy.is_working


def test_a_batch_that_a_module_isnt_defined_for_as_a_whole_is_degenerate() -> None:
    """A column that is constant by chance has no deviation; beside other samples it has."""

    class Standardise(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs - inputs.mean(dim=0)) / inputs.std(dim=0)

    def spoil(step: int, inputs: Tensor, _: Tensor) -> None:
        if step in (20, 30):
            inputs[:, 3] = 0.0

    diagnosis = Trained(spoil=spoil, model=nn.Sequential(Standardise(), make_model())).diagnosis
    assert (diagnosis.step, diagnosis.cause) == (20, Cause.DEGENERATE_BATCH)
    assert (diagnosis.origin.module, diagnosis.origin.operation) == ("0", "div")
    # Where the operation can be guarded the batch is kept, and the next such batch is no news.
    assert diagnosis.remedy.kind is RemedyKind.GUARD_LOSS


def test_samples_left_out_one_by_one_are_no_remedies_that_are_counted() -> None:
    """They are bounded by their share; an error that only one sample raises is that sample's."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        if bool((batch[0] == MARK).any()):
            raise ValueError("not in the table")
        return compute_loss(model, batch)

    one_remedy = DoctorSettings(max_remedies=1)
    trained = Trained(spoil=mark(4, 24, 44), loss=loss, settings=one_remedy)
    assert [diagnosis.step for diagnosis in trained.doctor.diagnoses] == [4, 24, 44]
    assert {diagnosis.cause for diagnosis in trained.doctor.diagnoses} == {Cause.BAD_DATA}
    assert {diagnosis.remedy.kind for diagnosis in trained.doctor.diagnoses} == {
        RemedyKind.DROP_SAMPLES
    }
    assert {diagnosis.num_samples for diagnosis in trained.doctor.diagnoses} == {1}


def mark(*steps: int) -> Spoil:
    """Return what marks the first sample of some steps."""

    def spoil(step: int, inputs: Tensor, _: Tensor) -> None:
        if step in steps:
            inputs[0, 0] = MARK

    return spoil


def test_a_momentum_changed_from_outside_is_the_optimizers_state() -> None:
    holder: list[torch.optim.Optimizer] = []

    def spoil(step: int, inputs: Tensor, labels: Tensor) -> None:
        if step == 20:
            for state in holder[0].state.values():
                state["momentum_buffer"].fill_(math.nan)

    class Watched(torch.optim.SGD):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            holder.append(self)

    original, torch.optim.SGD = torch.optim.SGD, Watched  # type: ignore[misc]
    try:
        diagnosis = Trained(spoil=spoil).diagnosis
    finally:
        torch.optim.SGD = original  # type: ignore[misc]
    assert diagnosis.cause is Cause.OPTIMIZER_STATE
    assert diagnosis.remedy.is_working


def test_a_fault_that_doesnt_repeat_is_called_so_and_no_cause_is_claimed() -> None:
    """The loss is NaN the 20th time it is computed, and never again."""
    calls = iter(range(1, 10_000))

    def fickle(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, outputs = compute_loss(model, batch)
        return (loss * math.nan if next(calls) == 20 else loss), outputs

    diagnosis = Trained(loss=fickle).diagnosis
    assert diagnosis.cause is Cause.NOT_REPRODUCIBLE
    assert diagnosis.remedy.kind is RemedyKind.REPEAT


def test_a_policy_decides_what_may_be_done() -> None:
    report = DoctorSettings(policies={Cause.BAD_DATA: RemedyPolicy.REPORT})
    with pytest.raises(TrainingHalted, match=r"non-finite-input at step 20.*bad-data"):
        Trained(spoil=spoil_input(math.nan), settings=report)
    skipped = Trained(
        spoil=spoil_input(math.nan), settings=DoctorSettings(default_policy=RemedyPolicy.SKIP)
    )
    assert skipped.diagnosis.remedy.kind is RemedyKind.SKIP_BATCH
    with pytest.raises(TrainingHalted):
        Trained(spoil=spoil_input(math.nan), settings=DoctorSettings(max_remedies=0))


def test_disarmed_it_stops_at_the_first_number_that_isnt_finite() -> None:
    with pytest.raises(TrainingHalted) as caught:
        Trained(spoil=spoil_input(math.nan), settings=DoctorSettings(is_armed=False))
    assert caught.value.diagnosis.step == 20
    assert caught.value.diagnosis.experiments == ()


def test_a_mistake_in_the_models_code_stays_the_error_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layer(inputs)
            return outputs

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Trained(model=Broken())


def test_an_error_that_a_step_raised_at_random_comes_with_the_halt() -> None:
    """An error that doesn't repeat ends training, and whoever catches that sees the error too."""
    calls = 0

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls > 5 and calls % 3 == 0:
            raise RuntimeError("the sensor is away")
        return compute_loss(model, batch)

    with pytest.raises(TrainingHalted) as caught:
        Trained(loss=failing)
    assert str(caught.value.__cause__) == "the sensor is away"
    assert "loss" not in str(caught.value)


def test_a_cured_training_repeats_bit_for_bit() -> None:
    first, again = (Trained(spoil=spoil_input(-1e20)) for _ in range(2))
    for weight, other in zip(first.weights(), again.weights(), strict=True):
        assert torch.equal(weight, other)


def test_little_memory_keeps_one_state_and_still_finds_the_cause() -> None:
    settings = DoctorSettings(memory_bytes=0)
    assert Trained(spoil=spoil_input(math.nan), settings=settings).diagnosis.cause is Cause.BAD_DATA

"""The doctor never crashes a training, and leaves a finite one alone unless harm is shown."""

import copy
import importlib
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedrounds.doctor
from fedrounds.diagnosis.values import Cause, Diagnosis, DoctorSettings, RemedyKind, Symptom
from fedrounds.doctor import Doctor, TrainingHalted
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.history import non_finite_buffers
from fedrounds.doctor.suspicion import choose, has_risen

NUM_STEPS = 11
BAD_STEP = 10
# What is left where the rest fails, what is raised on purpose, and what the loop itself calls.
SPARED = ("plain", "callbacks", "reports")
PUBLIC = (
    "Doctor.step",
    "Doctor.finish",
    "Doctor._go_on",
    "Doctor._give_up",
    "Doctor._stop_at",
    "Session.tell",
)


def modules() -> Iterator[ModuleType]:
    """Yield the doctor's modules."""
    for info in pkgutil.iter_modules(fedrounds.doctor.__path__):
        yield importlib.import_module(f"fedrounds.doctor.{info.name}")


def internal_functions() -> Iterator[tuple[str, list[tuple[object, str]]]]:
    """Yield each function and method by its name, and wherever it is looked up."""
    named = {module.__name__.rpartition(".")[2]: module for module in modules()}
    for name, module in named.items():
        if name in SPARED:
            continue
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                users: list[tuple[object, str]] = [
                    (other, key)
                    for short, other in named.items()
                    if short not in SPARED and vars(other).get(key) is value
                ]
                yield f"{name}.{key}", users
            elif inspect.isclass(value):
                for method, function in list(vars(value).items()):
                    called = f"{key}.{method}"
                    if inspect.isfunction(function) and called not in PUBLIC and method[:2] != "__":
                        yield f"{name}.{called}", [(value, method)]


FUNCTIONS = dict(internal_functions())


def called_functions(*, is_faulty: bool) -> set[str]:
    """Return the names of the functions that a training calls."""
    codes: dict[object, str] = {}
    for name, users in FUNCTIONS.items():
        function = getattr(*users[0])
        codes[function.__code__] = name
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in codes:
            called.add(codes[frame.f_code])

    def begin() -> None:
        sys.setprofile(note)

    try:
        train(is_faulty=is_faulty, spoil=begin)
    finally:
        sys.setprofile(None)
    return called


def make_model() -> nn.Module:
    """Return a small network that draws random numbers."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the outputs."""
    assert isinstance(batch, tuple)
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1]), outputs


def batches(*, is_faulty: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a training, in one of which an input is NaN."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(NUM_STEPS, 8, 4, generator=generator)
    given = [(features.clone(), (features[:, 0] > 0).long()) for features in drawn]
    if is_faulty:
        given[BAD_STEP - 1][0][2, 1] = torch.nan
    return given


def train(*, is_faulty: bool, spoil: Callable[[], None] | None) -> list[Tensor]:
    """Return the weights after a training with a doctor, or with None of a plain loop's."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(9)
    if spoil is None:
        for batch in batches(is_faulty=is_faulty):
            optimizer.zero_grad()
            compute_loss(model, batch)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return list(model.parameters())
    doctor = Doctor(model, optimizer, compute_loss, num_classes=2)
    spoil()
    for batch in batches(is_faulty=is_faulty):
        doctor.step(batch)
    doctor.finish()
    return list(model.parameters())


def fail_as(name: str, *_: object, **__: object) -> None:
    """Raise what nobody expects."""
    raise LookupError(name)


def break_function(patch: pytest.MonkeyPatch, name: str, users: list[tuple[object, str]]) -> None:
    """Make a function raise wherever it is looked up."""
    for owner, key in users:
        patch.setattr(owner, key, partial(fail_as, name))


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return train(is_faulty=False, spoil=None)


@pytest.mark.parametrize("is_faulty", [False, True], ids=["healthy", "faulty"])
def test_whatever_fails_in_the_doctor_the_training_goes_on(
    is_faulty: bool, plain: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Each function raises in turn; a healthy training ends with a plain loop's bits.

    A faulty training ends, or is stopped as not finite. A failure is logged at most once.
    """
    caplog.set_level(logging.WARNING)
    num_failed = 0
    called = called_functions(is_faulty=is_faulty)
    assert len(called) > (100 if is_faulty else 30)
    for name, users in FUNCTIONS.items():
        if name not in called:
            continue
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            spoil = partial(break_function, patch, name, users)
            trained: list[Tensor] = []
            try:
                trained = train(is_faulty=is_faulty, spoil=spoil)
            except TrainingHalted:
                assert is_faulty, name
        warnings = [record for record in caplog.records if "the doctor failed" in record.message]
        assert len(warnings) <= 1, name
        num_failed += len(warnings)
        for mine, undoctored in zip(trained, plain, strict=not is_faulty):
            assert is_faulty or torch.equal(mine, undoctored), name
    # The test itself is of use only where the functions are called.
    assert num_failed > 15


@pytest.mark.parametrize("is_armed", [True, False])
@pytest.mark.parametrize(
    "name", ["device_of", "non_finite_buffers", "take_snapshot", "NanGuard.examine", "is_finite"]
)
def test_a_doctor_that_fails_before_the_first_step_is_off(
    name: str, is_armed: bool, plain: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a doctor that is disarmed: it would only have stopped what isn't finite."""
    owner, _, method = name.rpartition(".")
    owner_path = f"fedrounds.doctor.nan_guard.{owner}" if owner else "fedrounds.doctor.doctor"
    monkeypatch.setattr(f"{owner_path}.{method}", partial(fail_as, name))
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(9)
    settings = DoctorSettings(is_armed=is_armed)
    doctor = Doctor(model, optimizer, compute_loss, num_classes=2, settings=settings)
    for batch in batches(is_faulty=False):
        doctor.step(batch)
    doctor.finish()
    for mine, undoctored in zip(model.parameters(), plain, strict=True):
        assert torch.equal(mine, undoctored)


def learn(
    steps: int,
    *,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    is_doctored: bool,
    make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
    | None = None,
) -> tuple[nn.Module, Doctor | None]:
    """Return a model trained on drawn batches, and its doctor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    doctor = (
        Doctor(model, optimizer, compute_loss, num_classes=4, scheduler=scheduler)
        if is_doctored
        else None
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch = draw(step, generator)
        if doctor is not None:
            doctor.step(batch)
            continue
        optimizer.zero_grad()
        compute_loss(model, batch)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    if doctor is not None:
        doctor.finish()
    return model, doctor


CENTRES = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2))


def draw_classes(classes: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a batch of these classes, each around a centre of its own."""
    labels = torch.tensor(classes)[torch.randint(len(classes), (24,), generator=generator)]
    return CENTRES[labels] + torch.randn(24, 4, generator=generator), labels


def accuracy(model: nn.Module) -> float:
    """Return the share of right answers over all classes."""
    inputs, labels = draw_classes([0, 1, 2, 3], torch.Generator().manual_seed(7))
    return float((model(inputs).argmax(1) == labels).float().mean())


def test_new_classes_are_no_fault() -> None:
    """A loss that jumps as the next task begins falls again; the weights are a plain loop's."""

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_classes([0, 1] if step < 60 else [2, 3], generator)

    model, doctor = learn(120, draw=draw, is_doctored=True)
    plain, _ = learn(120, draw=draw, is_doctored=False)
    assert doctor is not None
    assert doctor.diagnoses == []
    for mine, undoctored in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, undoctored)


def test_of_a_rate_that_spikes_once_only_that_step_is_left_out() -> None:
    """Lowering the rate heals, too, but leaving out one step does as well and changes less."""

    def draw(_: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_classes([0, 1, 2, 3], generator)

    def spike(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1e4 if k == 29 else 1.0)

    model, doctor = learn(90, draw=draw, is_doctored=True, make_scheduler=spike)
    assert doctor is not None
    (diagnosis,) = doctor.diagnoses
    assert diagnosis.remedy.kind is RemedyKind.SKIP_BATCH
    assert doctor.treatment.keeps_settings
    assert accuracy(model) > 0.9


def test_a_schedule_that_the_loop_steps_itself_is_not_changed() -> None:
    """The rate is set between the steps; a batch taken again is taken at the rate it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doctor = Doctor(model, optimizer, compute_loss, num_classes=2)
    rates = []
    for step, batch in enumerate(batches(is_faulty=True), start=1):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        rates.append(doctor.step(batch).lr)
    (diagnosis,) = doctor.diagnoses
    assert diagnosis.cause is Cause.BAD_DATA
    assert rates == [0.1 / step for step in range(1, NUM_STEPS + 1)]


def test_parameters_that_are_unfrozen_later_are_trained_on() -> None:
    """What was kept before is of another training; a fault after it is cured as before."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 8), nn.Linear(8, 2)
    model = nn.Sequential(first, nn.ReLU(), last)
    first.requires_grad_(False)
    optimizer = torch.optim.SGD(last.parameters(), lr=0.1)
    doctor = Doctor(model, optimizer, compute_loss, num_classes=2)
    before = first.weight.detach().clone()
    for step, batch in enumerate(batches(is_faulty=True), start=1):
        if step == BAD_STEP - 2:
            first.requires_grad_(True)
            optimizer.add_param_group({"params": list(first.parameters())})
        doctor.step(batch)
    assert [diagnosis.cause for diagnosis in doctor.diagnoses] == [Cause.BAD_DATA]
    assert not torch.equal(before, first.weight)


@pytest.mark.parametrize("ignored", [255, -1])
def test_labels_that_the_loss_ignores_are_healthy(ignored: int) -> None:
    """They are read off the loss's own call; as on a GPU, no label out of range is ever tried."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        outputs = model(batch[0])
        assert not bool((batch[1] == 9).any())
        return F.cross_entropy(outputs, batch[1], ignore_index=ignored), outputs

    model = make_model()
    doctor = Doctor(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, num_classes=2)
    doctor._can_fail = False
    for step, (inputs, labels) in enumerate(batches(is_faulty=False), start=1):
        labels[:2] = ignored
        if step == BAD_STEP:
            labels[5] = 9
        doctor.step((inputs, labels, torch.arange(8)))
    (diagnosis,) = doctor.diagnoses
    assert (diagnosis.cause, [sample.position for sample in diagnosis.samples]) == (
        Cause.BAD_LABEL,
        [5],
    )


def test_more_than_may_be_left_out_is_diagnosed_and_stops() -> None:
    """Every sample of a class is left out: that is a mistake in the data, not a cure."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_on(settings: DoctorSettings) -> Doctor:
        doctor = Doctor(model, optimizer, compute_loss, num_classes=2, settings=settings)
        for inputs, labels in batches(is_faulty=False):
            doctor.step((inputs, labels + 1))
        return doctor

    with pytest.raises(TrainingHalted):
        train_on(DoctorSettings())


def test_a_remedy_is_chosen_only_for_harm_that_it_removes() -> None:
    """The mildest, which comes first, of those that help about as much."""
    # From a usual 1 to 9: of that harm of 8 half is taken away by the second, all by the third.
    assert choose(9.0, [8.5, 5.0, 1.0], usual=1.0) == 2
    assert choose(9.0, [1.2, 1.0], usual=1.0) == 0
    # Beside a loss of 1e22 a loss of 1e13 is no cure, though nearly all of the harm is gone.
    assert choose(1e22, [1e13, 2.0, 1.0], usual=1.0) == 2
    assert choose(9.0, [6.0, 5.5], usual=1.0) is None
    assert choose(1.1, [1.0], usual=1.0) == 0
    # Without anything usual to compare with the loss has to fall by half.
    assert choose(9.0, [5.0], usual=None) is None
    assert choose(9.0, [4.0], usual=None) == 0
    assert choose(float("inf"), [float("inf"), 2.0], usual=1.0) == 1
    assert choose(1.0, [], usual=1.0) is None


def test_a_loss_has_risen_where_the_last_losses_are_twice_the_usual_loss() -> None:
    """Eight losses are judged by their median; a rise below 2 % of the first loss is none."""
    assert has_risen([9.0] * 8 + [2.0] * 7 + [90.0], usual=1.0, first_level=5.0)
    assert not has_risen([1.9] * 8, usual=1.0, first_level=5.0)
    assert not has_risen([0.09] * 8, usual=0.01, first_level=5.0)
    assert has_risen([-1.0] * 8, usual=-3.0, first_level=5.0) is False
    assert has_risen([0.5] * 8, usual=-0.2, first_level=5.0)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a regression."""
    assert isinstance(batch, tuple)
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("is_harmful", [True, False])
def test_an_outlier_is_left_out_only_where_the_loss_stays_higher_than_before(
    is_harmful: bool,
) -> None:
    """A row 10,000 times too large: Adam's history carries it on, a clipped gradient doesn't."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 1))
    inputs = torch.randn(110, 32, 6)
    targets = inputs.sum(dim=2, keepdim=True) / 6**0.5
    inputs[70, 3] *= 1e4
    plain, clip_norm = copy.deepcopy(model), None if is_harmful else 1.0
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    doctor = Doctor(model, adam if is_harmful else sgd, squared_error, clip_norm=clip_norm)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for batch in zip(inputs, targets, strict=True):
        doctor.step(batch)
        optimizer.zero_grad()
        squared_error(plain, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    doctor.finish()
    if is_harmful:
        (diagnosis,) = doctor.diagnoses
        assert (diagnosis.step, diagnosis.cause, diagnosis.num_samples) == (71, Cause.BAD_DATA, 1)
        assert diagnosis.remedy.kind is RemedyKind.DROP_SAMPLES
        assert squared_error(model, (inputs[-1], targets[-1])) < 0.05
        return
    assert doctor.diagnoses == []
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(("lr", "is_lost"), [(3e-5, True), (0.1, False)])
def test_updates_that_16_bits_round_away_are_reported_and_nothing_is_changed(
    lr: float, is_lost: bool
) -> None:
    """At a small rate most weights stay the same bits; at a large rate the training is healthy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 4)).to(torch.bfloat16)
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = (
        torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9) for network in (model, plain)
    )
    doctor = Doctor(model, optimizer, compute_loss, num_classes=4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(56):
        inputs, labels = draw_classes([0, 1, 2, 3], generator)
        batch = inputs.to(torch.bfloat16), labels
        doctor.step(batch)
        plain_optimizer.zero_grad()
        compute_loss(plain, batch)[0].backward()  # type: ignore[no-untyped-call]
        plain_optimizer.step()
    doctor.finish()
    diagnosed = [
        (diagnosis.symptom, diagnosis.cause, diagnosis.step) for diagnosis in doctor.diagnoses
    ]
    assert diagnosed == ([(Symptom.LOST_UPDATES, Cause.PRECISION, 49)] if is_lost else [])
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_buffer_that_was_never_finite_is_no_fault(value: float) -> None:
    """A constant of the model's, such as a mask; the doctor speaks where it does harm."""
    model = nn.Linear(4, 2)
    model.register_buffer("constant", torch.tensor([value, 1.0]))
    diagnoses: list[Diagnosis] = []
    doctor = Doctor(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss,
        on_diagnosis=diagnoses.append,
    )
    for _ in range(3):
        doctor.step((torch.randn(8, 4), torch.randint(2, (8,))))
    doctor.finish()
    assert diagnoses == []


def test_a_norm_layer_decides_what_running_statistics_are() -> None:
    """A buffer of the task's own may have their names, and mean not to be finite."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].register_buffer("running_var", torch.tensor(torch.inf))
    assert isinstance(model[0].running_var, Tensor)
    model[0].running_var.fill_(torch.inf)
    assert non_finite_buffers(model) == {"1.running_var"}


@pytest.mark.parametrize("clip_norm", [1e-3, 0.3, 1e9])
def test_clipped_gradients_are_those_of_a_plain_loop(clip_norm: float) -> None:
    """Bit for bit, where nothing, some or all of the steps are clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    doctor = Doctor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss, clip_norm=clip_norm
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches(is_faulty=False):
        doctor.step(batch)
        optimizer.zero_grad()
        compute_loss(plain, batch)[0].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
    doctor.finish()
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_a_buffer_that_stops_being_finite_is_diagnosed() -> None:
    """The other half: what was finite before the first step is watched."""

    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.register_buffer("seen", torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen.mul_(1e20)
            outputs: Tensor = self.head(inputs)
            return outputs

    model = Counting()
    diagnoses: list[Diagnosis] = []
    doctor = Doctor(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss,
        on_diagnosis=diagnoses.append,
    )
    for batch in batches(is_faulty=False):
        doctor.step(batch)
    doctor.finish()
    assert diagnoses[0].symptom is Symptom.NON_FINITE_BUFFER
    assert diagnoses[0].origin.tensor == "seen"

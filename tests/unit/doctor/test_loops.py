"""Training loops of many forms: healthy, a doctor changes no bit; faulty, it finds the sample."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedrounds.diagnosis.values import Cause
from fedrounds.doctor import Doctor
from fedrounds.errors import InvalidInput

NUM_STEPS = 24
BAD_STEP = 13
BAD_SAMPLE = 5


class Spectral(nn.Module):
    """Multiplies the spectrum of its input by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the filtered signal, [n, 4]."""
        filtered: Tensor = torch.fft.irfft(torch.fft.rfft(inputs) * self.weight, n=4)
        return filtered


def network() -> nn.Module:
    """Return a small network that draws random numbers."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def batches(*, is_faulty: bool) -> list[dict[str, Any]]:
    """Return batches of 8, in one of which an input is NaN."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_STEPS, 8, 4, generator=generator)
    given = [
        {"x": features.clone(), "labels": (features[:, 0] > 0).long(), "id": ["a"] * 8}
        for features in inputs
    ]
    if is_faulty:
        given[BAD_STEP - 1]["x"][BAD_SAMPLE, 2] = torch.nan
    return given


def loss_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and the outputs as Hugging Face's models do."""
    logits = model(batch["x"])
    return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits, "other": None}


def halved(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the loss as a loop that accumulates two batches divides it."""
    return loss_of(model, batch)["loss"] / 2  # type: ignore[no-any-return]


def magnified(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return a loss that the scaler's first scales take beyond the largest float."""
    return 8 * loss_of(model, batch)["loss"]  # type: ignore[no-any-return]


def autocast(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return a loss computed in bfloat16 where that will do."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_of(model, batch)["loss"]  # type: ignore[no-any-return]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam with a rate for each group."""
    first, *rest = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.1}, {"params": rest}]
    return torch.optim.Adam(groups, lr=0.05)


def nothing(*_: object) -> None:
    """Do nothing between two steps."""


@dataclass
class Setup:
    """One training: all that a loop owns."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    scaler: GradScaler | None = None
    averaged: AveragedModel | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """A form of loop: how it is set up, its loss, and what it does after a step (from 1)."""

    build: Callable[[], Setup]
    loss: Callable[..., Any] = loss_of
    every: int = 1
    after: Callable[[Setup, int, float], None] = nothing
    needs_closure: bool = False
    clip_norm: float | None = None


def simple(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> Setup:
    """Return the network with an optimizer."""
    model = network()
    return Setup(model, make_optimizer(model))


def with_scaler() -> Setup:
    """Return a training whose first scaled gradients overflow."""
    setup = simple()
    setup.scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=4)
    return setup


def with_average() -> Setup:
    """Return a training with a moving average of its weights."""
    setup = simple()
    mean = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    setup.averaged = AveragedModel(setup.model, multi_avg_fn=mean)
    return setup


def with_outer(make_scheduler: Callable[[torch.optim.Optimizer], Any]) -> Setup:
    """Return a training whose schedule is stepped by the loop."""
    setup = simple()
    setup.extra["schedule"] = make_scheduler(setup.optimizer)
    return setup


def step_schedule(setup: Setup, step: int, loss: float) -> None:
    """Step a schedule every four steps; that on a plateau needs the loss."""
    schedule = setup.extra["schedule"]
    if step % 4 == 0:
        is_plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        schedule.step(loss) if is_plateau else schedule.step()


def frozen() -> Setup:
    """Return a training of the last layer."""
    model = network()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    return Setup(
        model,
        torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad], 0.1
        ),
    )


def unfreeze(setup: Setup, step: int, loss: float) -> None:
    """Train the first layer, too, from the seventh step on, and no longer the last layer's bias."""
    if step == 6:
        added = list(setup.model[0].parameters())  # type: ignore[index]
        for parameter in added:
            parameter.requires_grad_(True)
        setup.optimizer.add_param_group({"params": added, "lr": 0.05})
        setup.model[3].bias.requires_grad_(False)  # type: ignore[index]


def spectral() -> Setup:
    """Return a network with complex parameters."""
    torch.manual_seed(3)
    model = nn.Sequential(Spectral(), nn.Linear(4, 2))
    return Setup(model, torch.optim.Adam(model.parameters(), 0.05))


def sparse() -> Setup:
    """Return a network with an embedding whose gradients are sparse."""
    torch.manual_seed(3)
    model = nn.ModuleList([nn.Embedding(4, 4, sparse=True), nn.Linear(4, 2, bias=False)])
    return Setup(model, torch.optim.SGD(model.parameters(), 0.1))


def of_numbers(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss with the input moved by what is learned of each sample's largest entry."""
    embedding, last = model.children()
    outputs = last(batch["x"] + embedding(batch["x"].argmax(dim=1)))
    return F.cross_entropy(outputs, batch["labels"]), outputs


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that computes the loss several times in a step."""
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)


LOOPS = {
    "outputs in a dictionary": Loop(simple),
    "autocast": Loop(simple, loss=autocast),
    "scaler": Loop(with_scaler, loss=magnified),
    "scaler, clipped": Loop(with_scaler, loss=magnified, clip_norm=1e3),
    "accumulation": Loop(simple, loss=halved, every=2),
    "accumulation of three": Loop(simple, loss=halved, every=3),
    "accumulation with a scaler": Loop(with_scaler, loss=magnified, every=2),
    "L-BFGS": Loop(lambda: simple(lbfgs), needs_closure=True),
    "moving average": Loop(with_average),
    "plateau": Loop(
        lambda: with_outer(lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)),
        after=step_schedule,
    ),
    "schedule by epoch": Loop(
        lambda: with_outer(
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)
        ),
        after=step_schedule,
    ),
    "unfreezing": Loop(frozen, after=unfreeze),
    "complex parameters": Loop(spectral),
    "sparse gradients": Loop(sparse, loss=of_numbers, clip_norm=1e3),
}


def train(loop: Loop, *, is_doctored: bool, is_faulty: bool = False) -> tuple[list[Tensor], Any]:
    """Return all that a training leaves, and the doctor (None in a plain loop)."""
    setup = loop.build()
    doctor = None
    if is_doctored:
        doctor = Doctor(
            setup.model,
            setup.optimizer,
            loop.loss,
            scaler=setup.scaler,
            averaged=setup.averaged,
            clip_norm=loop.clip_norm,
            num_classes=2,
        )
    torch.manual_seed(9)
    for step, batch in enumerate(batches(is_faulty=is_faulty), start=1):
        updates = step % loop.every == 0
        if doctor is not None:
            loss = doctor.step(batch, updates=updates).loss
        else:
            loss = plain_step(loop, setup, batch, begins=step % loop.every == 1, updates=updates)
        loop.after(setup, step, loss)
    if doctor is not None:
        doctor.finish()
    average = [] if setup.averaged is None else setup.averaged.state_dict().values()
    rates = [torch.tensor(group["lr"]) for group in setup.optimizer.param_groups]
    return [*setup.model.state_dict().values(), *average, *rates], doctor


def plain_step(loop: Loop, setup: Setup, batch: Any, *, begins: bool, updates: bool) -> float:  # noqa: ANN401
    """Take a step as the documentation of torch writes it."""
    optimizer, scaler = setup.optimizer, setup.scaler

    def compute() -> Tensor:
        if begins or loop.every == 1:
            optimizer.zero_grad()
        computed = loop.loss(setup.model, batch)
        loss = computed["loss"] if isinstance(computed, dict) else computed
        loss = loss[0] if isinstance(loss, tuple) else loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()  # type: ignore[no-any-return]

    if loop.needs_closure:
        return float(optimizer.step(compute))  # type: ignore[arg-type]
    loss = compute()
    if updates:
        if scaler is None:
            optimizer.step()
        else:
            if loop.clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(setup.model.parameters(), loop.clip_norm)
            scaler.step(optimizer)
            scaler.update()
        if setup.averaged is not None:
            setup.averaged.update_parameters(setup.model)
    return float(loss)


@pytest.mark.parametrize("name", LOOPS)
def test_a_healthy_training_keeps_every_bit(name: str) -> None:
    """Weights, averages and rates are those of the plain loop."""
    plain, _ = train(LOOPS[name], is_doctored=False)
    doctored, doctor = train(LOOPS[name], is_doctored=True)
    assert doctor.diagnoses == []
    assert all(torch.equal(tensor, other) for tensor, other in zip(plain, doctored, strict=True))


@pytest.mark.parametrize("name", LOOPS)
def test_a_bad_sample_is_named_and_left_out(name: str) -> None:
    """The same loops with one NaN: step and sample are right, and nothing bad is left."""
    left, doctor = train(LOOPS[name], is_doctored=True, is_faulty=True)
    (diagnosis,) = doctor.diagnoses
    assert (diagnosis.cause, diagnosis.step) == (Cause.BAD_DATA, BAD_STEP)
    assert [sample.position for sample in diagnosis.samples] == [BAD_SAMPLE]
    assert all(bool(tensor.isfinite().all()) for tensor in left)


def test_a_scaler_that_would_leave_out_every_step_is_no_scaler_s_matter() -> None:
    """The root of 0 has no gradient whatever the scale: found once the scale is down to 1."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=4.0)

    def compute_loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        outputs: Tensor = model(batch["x"])
        return torch.sqrt(0 * outputs).sum() + outputs.square().mean()

    doctor = Doctor(model, optimizer, compute_loss, scaler=scaler)
    for batch in batches(is_faulty=False)[:6]:
        doctor.step(batch)
    assert doctor.diagnoses[0].step == 3
    assert doctor.diagnoses[0].cause is Cause.LOSS_FUNCTION


def test_two_optimizers_that_take_turns_have_a_doctor_each() -> None:
    """A GAN whose fakes are part of the judge's batch: bit for bit, and a bad batch is named."""

    def run(*, is_doctored: bool, is_faulty: bool) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(3)
        maker, judge = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        both = [torch.optim.Adam(model.parameters(), 0.01) for model in (judge, maker)]

        def loss_of_judge(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
            real, fake = model(batch["real"]), model(batch["fake"])
            return F.softplus(-real).mean() + F.softplus(fake).mean()

        def loss_of_maker(model: nn.Module, noise: Tensor) -> Tensor:
            return F.softplus(-judge(model(noise))).mean()

        doctors = (
            [Doctor(judge, both[0], loss_of_judge), Doctor(maker, both[1], loss_of_maker)]
            if is_doctored
            else []
        )
        for batch in batches(is_faulty=is_faulty):
            noise = torch.randn(8, 2)
            given = {"real": batch["x"], "fake": maker(noise).detach()}
            if is_doctored:
                doctors[0].step(given)
                doctors[1].step(noise)
                continue
            for optimizer, loss, model, inputs in (
                (both[0], loss_of_judge, judge, given),
                (both[1], loss_of_maker, maker, noise),
            ):
                optimizer.zero_grad()
                loss(model, inputs).backward()  # type: ignore[arg-type,no-untyped-call]
                optimizer.step()
        diagnoses = [each for doctor in doctors for each in doctor.diagnoses]
        return [*maker.parameters(), *judge.parameters()], diagnoses

    plain, _ = run(is_doctored=False, is_faulty=False)
    doctored, diagnoses = run(is_doctored=True, is_faulty=False)
    assert diagnoses == []
    assert all(torch.equal(tensor, other) for tensor, other in zip(plain, doctored, strict=True))
    left, (diagnosis,) = run(is_doctored=True, is_faulty=True)
    assert (diagnosis.cause, diagnosis.step) == (Cause.BAD_DATA, BAD_STEP)
    assert all(bool(tensor.isfinite().all()) for tensor in left)


class Parallel(nn.Linear):
    """Looks like a model in one of several processes."""

    def no_sync(self) -> None:
        """Stand for the method of torch's parallel wrappers."""


@pytest.mark.parametrize(
    ("model", "make_optimizer", "given", "sentence"),
    [
        (Parallel(4, 2), adam, {}, "data-parallel"),
        (nn.Linear(4, 2), lbfgs, {"scaler": GradScaler("cpu")}, "GradScaler"),
        (nn.Linear(4, 2), lambda _: adam(nn.Linear(3, 2)), {}, "2 parameters that the model"),
        (nn.Linear(4, 2), adam, {"scheduler": "plateau"}, "ReduceLROnPlateau needs a metric"),
    ],
)
def test_what_cannot_be_repeated_is_refused_with_a_sentence(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    given: dict[str, Any],
    sentence: str,
) -> None:
    """Before the first step, and not by a crash in the middle."""
    optimizer = make_optimizer(model)
    if given.get("scheduler") == "plateau":
        given = {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer)}
    with pytest.raises(InvalidInput, match=sentence):
        Doctor(model, optimizer, loss_of, **given)


@pytest.mark.parametrize("computed", [None, 3.0, torch.ones(2), {"logits": torch.ones(2)}])
def test_a_loss_that_is_none_is_refused_at_the_first_step(computed: object) -> None:
    """The sentence says what compute_loss must return."""
    model = network()
    doctor = Doctor(model, adam(model), lambda *_: computed)
    with pytest.raises(InvalidInput, match="must return a tensor of one number"):
        doctor.step(batches(is_faulty=False)[0])


def test_batches_are_not_collected_for_a_closure() -> None:
    """L-BFGS computes the loss of one batch; gradients of others can't be added to it."""
    model = network()
    doctor = Doctor(model, lbfgs(model), loss_of)
    with pytest.raises(InvalidInput, match="can't wait for more batches"):
        doctor.step(batches(is_faulty=False)[0], updates=False)

"""The step size of each step, against formulas written out and against torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from fedrounds.errors import InvalidInput
from fedrounds.training.loop import Callbacks, StepProgress, train_model
from fedrounds.training.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_scheduler
from fedrounds.types import Schedule

STEPS_PER_EPOCH = 4


def rates(schedule: Schedule, *, epochs: int, lr: float = 0.5) -> list[float]:
    """Return the step size that train_model really used in each step, on epochs of four steps."""
    seen: list[StepProgress] = []
    batch = (torch.ones(2, 3), torch.tensor([0, 1]))
    train_model(
        nn.Linear(3, 2),
        [batch] * STEPS_PER_EPOCH,
        epochs=epochs,
        lr=lr,
        schedule=schedule,
        callbacks=Callbacks(on_step=seen.append),
    )
    return [progress.lr for progress in seen]


def test_without_a_schedule_the_step_size_stays() -> None:
    assert rates(Schedule(), epochs=2) == [0.5] * 8


def test_step_multiplies_every_few_epochs() -> None:
    """Decay 0.1 every 2 epochs of 4 steps: 8 steps each at lr, lr / 10, and 4 at lr / 100."""
    lrs = rates(Schedule(name="step", decay_epochs=2, decay=0.1), epochs=5)
    assert lrs == pytest.approx([0.5] * 8 + [0.05] * 8 + [0.005] * 4)


def test_warm_up_grows_evenly_and_then_stays() -> None:
    """One and a half epochs are 6 steps: 1/6, 2/6, ... 6/6 of lr."""
    lrs = rates(Schedule(warmup_epochs=1.5), epochs=3)
    assert lrs == pytest.approx([0.5 * k / 6 for k in range(1, 7)] + [0.5] * 6)


def test_cosine_falls_along_half_a_wave_behind_the_warm_up() -> None:
    """After 4 of 12 steps the rest of 8 is at cos(pi k / 8); lr / 2 half way, k = 4."""
    lrs = rates(Schedule(name="cosine", warmup_epochs=1), epochs=3)
    falling = [0.25 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert lrs == pytest.approx([0.125, 0.25, 0.375, 0.5, *falling])
    assert lrs[8] == pytest.approx(0.25)


def test_the_schedules_are_torchs_own() -> None:
    """StepLR stepped once an epoch, CosineAnnealingLR once a step, over five epochs."""

    def torchs(make: type[StepLR | CosineAnnealingLR], each: int, **options: float) -> list[float]:
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = make(optimizer, **options)  # type: ignore[arg-type]  # each has its own
        lrs = []
        for step in range(1, 21):
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step % each == 0:
                scheduler.step()
        return lrs

    step = Schedule(name="step", decay_epochs=2, decay=0.3)
    expected = torchs(StepLR, STEPS_PER_EPOCH, step_size=2, gamma=0.3)
    assert rates(step, epochs=5) == pytest.approx(expected)
    cosine = Schedule(name="cosine")
    assert rates(cosine, epochs=5) == pytest.approx(torchs(CosineAnnealingLR, 1, T_max=20))


@given(
    name=st.sampled_from(SCHEDULES),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    warmup=st.floats(0, 0.99),
    decay_epochs=st.integers(1, 5),
    decay=st.floats(0.1, 1),
)
def test_rounds_one_after_another_follow_the_schedule_of_the_whole_run(
    name: str, size: tuple[int, int], warmup: float, decay_epochs: int, decay: float
) -> None:
    """Training starts anew in each round, but its step sizes go on where they were."""
    epochs, rounds = size
    total = epochs * rounds

    def schedule_from(first_epoch: int) -> Schedule:
        return Schedule(
            name=name,
            warmup_epochs=warmup * total,
            decay_epochs=decay_epochs,
            decay=decay,
            first_epoch=first_epoch,
            total_epochs=total,
        )

    whole = rates(schedule_from(0), epochs=total)
    parts = [
        rate for r in range(rounds) for rate in rates(schedule_from(r * epochs), epochs=epochs)
    ]
    assert parts == whole
    assert all(0 < rate <= 0.5 for rate in whole)


def test_the_schedule_changes_what_is_learned() -> None:
    """SGD without momentum on a constant gradient moves by lr * gradient summed over the rates."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    batch = (torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))
    trained = train_model(
        model,
        [batch] * 4,
        epochs=2,
        lr=0.5,
        momentum=0.0,
        loss=lambda outputs, _: outputs[:, 0].sum(),
        schedule=Schedule(name="step", decay_epochs=1, decay=0.1),
    )
    # Four steps of 0.5 and four of 0.05, down a slope of 1.
    assert trained.state_dict["weight"][:, 0].tolist() == pytest.approx([-2.2, 0.0])


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (Schedule(name="linear"), "there are: constant, step, cosine"),
        (Schedule(warmup_epochs=2), "from 0 to below the schedule's 2 epochs, but is 2"),
        (Schedule(warmup_epochs=math.nan), "warmup_epochs"),
        (Schedule(warmup_epochs=-1), "warmup_epochs"),
        (Schedule(name="step", decay_epochs=0), "decay_epochs must be at least 1"),
        (Schedule(name="step", decay=0), "decay must be above 0 and at most 1"),
        (Schedule(name="step", decay=math.nan), "decay"),
        (Schedule(first_epoch=3, total_epochs=4), "2 epochs from epoch 3 on don't fit into .* 4"),
        (Schedule(first_epoch=-1), "don't fit"),
    ],
)
def test_a_schedule_that_cant_be_is_refused(schedule: Schedule, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        rates(schedule, epochs=2)


def test_a_schedule_needs_to_know_how_many_steps_there_are() -> None:
    batches = iter([(torch.ones(2, 3), torch.tensor([0, 1]))])
    with pytest.raises(InvalidInput, match="needs a dataloader that knows its length"):
        train_model(nn.Linear(3, 2), batches, epochs=1, schedule=Schedule(name="cosine"))
    optimizer = make_optimizer(
        "sgd", [nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.0, weight_decay=0.0
    )
    assert make_scheduler(optimizer, Schedule(), steps_per_epoch=None, epochs=1) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name: str) -> None:
    """On (w - 3)^2 from 0: whichever it is, w comes closer to 3."""
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = make_optimizer(name, [parameter], lr=0.05, momentum=0.5, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (parameter - 3) ** 2
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    assert 0.5 < parameter.item() < 3.5

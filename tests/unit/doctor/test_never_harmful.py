"""The doctor never crashes a training, and leaves a finite one alone unless harm is shown."""

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
from fedrounds.doctor import Doctor, TrainingHalted
from fedrounds.doctor.batches import Batch

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
    for one in pkgutil.iter_modules(fedrounds.doctor.__path__):
        yield importlib.import_module(f"fedrounds.doctor.{one.name}")


def internal_functions() -> Iterator[tuple[str, list[tuple[object, str]]]]:
    """Yield each function and method by its name, and wherever it is looked up."""
    named = {one.__name__.rpartition(".")[2]: one for one in modules()}
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
    given = [(one.clone(), (one[:, 0] > 0).long()) for one in drawn]
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

    A faulty one ends, or is stopped as one that isn't finite. What failed is told at most once.
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
            try:
                trained = train(is_faulty=is_faulty, spoil=spoil)
            except TrainingHalted:
                assert is_faulty, name
                continue
        told = [one for one in caplog.records if "the doctor failed" in one.message]
        assert len(told) <= 1, name
        num_failed += len(told)
        if not is_faulty:
            for mine, theirs in zip(trained, plain, strict=True):
                assert torch.equal(mine, theirs), name
    # The test itself is of use only where the functions are called.
    assert num_failed > 15

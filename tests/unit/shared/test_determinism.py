"""Results repeat, and torch's compiler isn't loaded for that."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedrounds.training.determinism import repeatable
from fedrounds.training.optimizers import OPTIMIZERS, make_optimizer

COMPILER = ("torch._dynamo", "torch._inductor", "triton")


def flags() -> tuple[bool, bool, int]:
    """Return what `repeatable` sets."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("has_private_function", [True, False])
def test_flags_are_set_and_put_back(
    monkeypatch: pytest.MonkeyPatch, has_private_function: bool
) -> None:
    """Whatever was in force before, and also where torch has its private function no more."""
    before = flags()
    if not has_private_function:
        private = torch._C._set_deterministic_algorithms
        monkeypatch.delattr(torch._C, "_set_deterministic_algorithms")
        monkeypatch.setattr(torch, "use_deterministic_algorithms", private)
    with repeatable(num_threads=before[2] + 1):
        assert flags() == (True, True, before[2] + 1)
        with repeatable(num_threads=1):
            assert flags() == (True, True, 1)
        assert flags() == (True, True, before[2] + 1)
    assert flags() == before


def test_training_and_its_diagnosis_never_load_the_compiler() -> None:
    """It takes 150 MB, seconds, and a temporary folder that can be written to."""
    program = f"""
        import sys, torch
        from fedrounds.training.determinism import repeatable
        from fedrounds.diagnosis.values import DoctorSettings
        from fedrounds.data import make_loader
        from fedrounds.training.optimizers import OPTIMIZERS
        from fedrounds.tasks.task import DataRequest
        from fedrounds.training.loop import Callbacks, DoctorContext, train_model
        from fedrounds.types import Schedule
        from tests.tiny_task import tiny

        examples = tiny.load_train(DataRequest())
        examples.tensors[0][3, 2] = torch.nan
        diagnoses = []
        with repeatable(num_threads=1):
            for name in OPTIMIZERS:
                loader = make_loader(examples, batch_size=8, seed=0)
                train_model(
                    tiny.build_model(), loader, optimizer=name, clip_norm=1.0,
                    schedule=Schedule(name="cosine"), doctor=DoctorSettings(),
                    doctor_context=DoctorContext(num_classes=tiny.num_classes),
                    callbacks=Callbacks(on_diagnosis=diagnoses.append),
                )
            assert torch.are_deterministic_algorithms_enabled()
        assert len(diagnoses) >= len(OPTIMIZERS)
        print([name for name in {COMPILER} if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_our_optimizers_are_torchs() -> None:
    """The same bits in parameters and state after steps, reset gradients and a saved state."""
    originals: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "sgd": lambda some: SGD(some, lr=0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda some: Adam(some, lr=0.1, betas=(0.9, 0.999), weight_decay=0.01),
        "adamw": lambda some: AdamW(some, lr=0.1, betas=(0.9, 0.999), weight_decay=0.01),
    }
    assert OPTIMIZERS.keys() == originals.keys()
    for name, original in originals.items():
        own = train(partial(make_optimizer, name, lr=0.1, momentum=0.9, weight_decay=0.01))
        torch.testing.assert_close(own, train(original), rtol=0, atol=0)


def train(make: Callable[[list[nn.Parameter]], Optimizer]) -> list[Any]:
    """Return a model's parameters and its optimizer's state after three steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(list(model.parameters()))
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    return [model.state_dict(), optimizer.state_dict()["state"]]

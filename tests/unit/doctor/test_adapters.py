"""The doctor in the trainers of Lightning and of Hugging Face, with their real packages.

Install them with `scripts/setup dev,plot,adapters`.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedrounds.diagnosis.values import Cause


def load_example(name: str, *packages: str) -> ModuleType:
    """Return an example's module; skip the test where a package that it needs isn't installed."""
    for package in packages:
        pytest.importorskip(
            package, reason=f"{package} isn't installed: scripts/setup dev,plot,adapters"
        )
    return importlib.import_module(f"examples.{name}")


def expect_same_weights(mine: Any, expected: Any) -> None:  # noqa: ANN401
    """Compare two models bit for bit."""
    for own, other in zip(mine.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)


def expect_cured(doctor: Any, model: Any) -> None:  # noqa: ANN401
    """The bad example is named in the batch of its first epoch, and the model stays finite."""
    assert [diagnosis.cause for diagnosis in doctor.diagnoses] == [Cause.BAD_DATA]
    assert len(doctor.diagnoses[0].samples) == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_hugging_face_trainer_with_the_doctor_trains_the_same(
    tmp_path: Path, accumulation: int
) -> None:
    example = load_example("hugging_face_trainer", "transformers", "accelerate")
    plain, doctored = (
        example.train(trainer_class, str(tmp_path), is_faulty=False, accumulation=accumulation)
        for trainer_class in (example.Trainer, example.DoctoredTrainer)
    )
    assert doctored.doctor.diagnoses == []
    expect_same_weights(doctored.model, plain.model)


def test_a_hugging_face_trainer_is_cured(tmp_path: Path) -> None:
    example = load_example("hugging_face_trainer", "transformers", "accelerate")
    trained = example.train(example.DoctoredTrainer, str(tmp_path), is_faulty=True)
    expect_cured(trained.doctor, trained.model)


def test_a_lightning_module_with_the_doctor_trains_the_same() -> None:
    example = load_example("lightning_module", "lightning")
    plain, doctored = (
        example.train(module_class, is_faulty=False)
        for module_class in (example.Classifier, example.DoctoredClassifier)
    )
    assert doctored.doctor.diagnoses == []
    assert doctored.trainer.global_step == plain.trainer.global_step
    expect_same_weights(doctored, plain)


def test_a_lightning_module_is_cured() -> None:
    example = load_example("lightning_module", "lightning")
    trained = example.train(example.DoctoredClassifier, is_faulty=True)
    expect_cured(trained.doctor, trained)

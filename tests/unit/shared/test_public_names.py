"""The names that a user's code rests on: they stay where they are."""

import importlib
import subprocess
import sys

import pytest

import fedrounds

PUBLIC = {
    "fedrounds": (
        *("DataRequest", "Doctor", "DoctorSettings", "Partition", "Task"),
        *("evaluate", "load_data", "make_loader", "need_root", "train_model"),
    ),
    "fedrounds.data": (
        *("AugmentedBatches", "ImageClassificationData", "NumberedLoader", "PARTITIONERS"),
        *("load_data", "load_images", "make_loader", "partition_indices", "to_dataset"),
    ),
    "fedrounds.doctor": ("Doctor", "DoctorSettings", "StepReport", "TrainingHalted"),
    "fedrounds.diagnosis.text": ("experiment_rows", "facts", "verdict"),
    "fedrounds.diagnosis.values": ("Cause", "Diagnosis", "DoctorSettings", "Remedy"),
    "fedrounds.errors": ("DataUnavailable", "FederationError", "InvalidInput"),
    "fedrounds.strategies": (
        "Cohort",
        "Matrix",
        "ServerOptimizer",
        "StrategySettings",
        "Weights",
        "mean_by",
    ),
}
"""A name may be added; a name that is removed or moved breaks somebody's task or strategy."""


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_name_is_where_it_was(module: str) -> None:
    """Each is importable from the module that the documents name."""
    there = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(there, name)] == []


def test_the_package_lists_what_it_exports() -> None:
    """`dir` and a star import show the public names, and an unknown one is a plain error."""
    assert sorted(fedrounds.__all__) == sorted(PUBLIC["fedrounds"])
    assert set(fedrounds.__all__) <= set(dir(fedrounds))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        getattr(fedrounds, "Trainer")  # noqa: B009  # mypy refuses the name


def test_the_package_alone_is_imported_without_torch() -> None:
    """In a fresh process: a command such as `--help` must not wait for torch."""
    code = "import sys, fedrounds; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

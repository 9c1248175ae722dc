"""The doctor of a training: notices a number that isn't finite, finds its cause, and cures it."""

from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.doctor.doctor import Doctor
from fedrounds.doctor.reports import StepReport, TrainingHalted
from fedrounds.doctor.stepping import UNTREATED, Overrides

__all__ = [
    "UNTREATED",
    "Doctor",
    "DoctorSettings",
    "Overrides",
    "StepReport",
    "TrainingHalted",
]

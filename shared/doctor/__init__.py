"""The doctor of a training: notices a number that isn't finite, finds its cause, and cures it."""

from shared.diagnosis import DoctorSettings
from shared.doctor.doctor import Doctor
from shared.doctor.reports import StepReport, TrainingHalted
from shared.doctor.stepping import UNTREATED, Treatment

__all__ = [
    "UNTREATED",
    "Doctor",
    "DoctorSettings",
    "StepReport",
    "TrainingHalted",
    "Treatment",
]

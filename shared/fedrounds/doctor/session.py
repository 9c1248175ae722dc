"""One training under the doctor: what its parts share and change."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedrounds.diagnosis.values import Diagnosis
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.history import StepHistory
from fedrounds.doctor.monitor import Monitor
from fedrounds.doctor.stepping import Attempt, Overrides, StepOutcome, TrainingState, take_step


@dataclass(kw_only=True)
class Session:
    """The training, what is known of it, the newest step's number, and the overrides in force."""

    training: TrainingState
    history: StepHistory
    monitor: Monitor
    device: torch.device
    treatment: Overrides
    on_replay: Callable[[], None]
    on_diagnosis: Callable[[Diagnosis], None]
    step: int = 0
    num_updates: int = 0
    step_seconds: float = 0.0
    """How long a step took of late: the mean of the last steps, with the newest an eighth of it."""
    diagnoses: list[Diagnosis] = field(default_factory=list)

    def take(self, batch: Batch, attempt: Attempt, *, updates: bool = True) -> StepOutcome:
        """Take the newest step on a batch, under the overrides in force."""
        began = time.monotonic()
        outcome = take_step(
            self.training,
            batch,
            self.treatment,
            step=self.step,
            updates=updates,
            # Only where all gradients are there.
            is_measured=updates and self.monitor.needs_measure(self.num_updates),
            attempt=attempt,
        )
        seconds = time.monotonic() - began
        self.step_seconds += (seconds - self.step_seconds) / (8 if self.step_seconds else 1)
        return outcome

    def tell(self, diagnosis: Diagnosis) -> None:
        """Keep a diagnosis, and tell of it."""
        self.diagnoses.append(diagnosis)
        self.on_diagnosis(diagnosis)

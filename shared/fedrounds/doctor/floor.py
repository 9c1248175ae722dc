"""Going on without a cure: the least that a training under the doctor comes to.

Where nothing that the doctor may do helps, or its allowance is used up, training goes on as a plain
loop that skips what it can't learn from. So a training with a doctor ends no worse than without it,
nor than a training that skips its bad steps.
"""

from dataclasses import replace

from fedrounds.doctor.batches import Batch
from fedrounds.doctor.history import (
    Snapshot,
    is_finite,
    restore_snapshot,
    settings_of,
    take_snapshot,
)
from fedrounds.doctor.monitor import INTERVAL
from fedrounds.doctor.stepping import (
    Attempt,
    Overrides,
    StepOutcome,
    TrainingState,
    end_step,
    take_step,
)


class Floor:
    """Takes the steps of a training that is treated no further; keeps its last good state.

    A step is made if its gradient is finite, whatever its loss is. Where the weights or the
    optimizer's state aren't finite any more, training goes back to the last good state, at most
    eight steps old.
    """

    def __init__(self, training: TrainingState, treatment: Overrides, *, step: int) -> None:
        self._training = training
        self._treatment = replace(treatment, trusts_gradient=True)
        self._good = take_snapshot(training, step=step)

    def take(
        self, batch: Batch, *, step: int, updates: bool = True, attempt: Attempt | None = None
    ) -> StepOutcome:
        """Take a step; the outcome says it isn't taken where its gradient isn't finite."""
        outcome = take_step(
            self._training, batch, self._treatment, step=step, updates=updates, attempt=attempt
        )
        if outcome.error is not None:
            return outcome
        is_judged = outcome.is_taken and (updates or self._training.scaler is None)
        if is_judged and not outcome.has_finite_gradient:
            if updates:
                self._training.window.is_open = False
                if self._training.scaler is not None:
                    self._training.scaler.update()
                end_step(self._training)
            outcome = outcome._replace(is_taken=False)
        if step - self._good.step >= INTERVAL:
            self.keep(step=step)
        return outcome

    def keep(self, *, step: int) -> None:
        """Keep the state that the training has after `step`, or go back to the last good state."""
        if is_finite(self._training):
            self._good = take_snapshot(self._training, step=step, spare=self._good)
        else:
            restore_weights(self._training, self._good)


def restore_weights(training: TrainingState, snapshot: Snapshot) -> None:
    """Put weights, buffers and the optimizer's state back, and leave the rates as they are."""
    settings = settings_of(training.optimizer)
    schedule = None if training.scheduler is None else training.scheduler.state_dict()
    restore_snapshot(training, snapshot)
    if training.scheduler is not None and schedule is not None:
        training.scheduler.load_state_dict(schedule)
    for group, kept in zip(training.optimizer.param_groups, settings, strict=True):
        group.update(kept)

"""How a step went, and the end of a training that can't go on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fedrounds.diagnosis.values import Cause, Diagnosis, Symptom
from fedrounds.doctor.batches import Batch, labels_of, tensors_of
from fedrounds.errors import FederationError


class StepReport(NamedTuple):
    """A step that went well, perhaps after a cure; `step` counts from 1.

    `grad_norm` is the global L2 norm before clipping, None where it wasn't measured; `lr` the rate
    in force, `outputs` what `compute_loss` gave beside the loss, `batch` what was learned from, of
    `num_classes` classes where that is known. Where nothing of the batch was left to learn from,
    `batch_size` is 0 and the loss nan.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    outputs: Any
    batch: Batch
    num_classes: int | None
    batch_size: int

    @property
    def targets(self) -> Tensor | None:
        """The last tensor of the batch, None if it has none."""
        return next(reversed(tensors_of(self.batch)), None)

    @property
    def labels(self) -> Tensor | None:
        """The batch's labels (see `fedrounds.doctor.batches.labels_among`), None if it has none."""
        return labels_of(self.batch, num_classes=self.num_classes)


class TrainingHalted(FederationError):
    """Training went wrong and may not or can't be cured; the model is of no use.

    `diagnosis` says all that is known, and carries no weights. Where the step raised an error, that
    error is the exception's `__cause__`.
    """

    status = "ABORTED"

    def __init__(self, diagnosis: Diagnosis) -> None:
        where = diagnosis.origin.tensor or diagnosis.origin.module
        last = diagnosis.trend[-1] if diagnosis.trend else None
        is_known = last is not None and diagnosis.symptom is not Symptom.STEP_FAILED
        loss = f", loss {last.loss:g}" if last is not None and is_known else ""
        cause = "" if diagnosis.cause is Cause.UNKNOWN else f": {diagnosis.cause}"
        super().__init__(
            f"{diagnosis.symptom}{f' in {where}' if where else ''} at step {diagnosis.step} "
            f"(epoch {diagnosis.epoch}, batch {diagnosis.batch}, lr {diagnosis.lr:g}{loss}){cause}"
            f"{_ADVICE[diagnosis.cause]}"
        )
        self.diagnosis = diagnosis


_ADVICE: Mapping[Cause, str] = {
    Cause.BAD_LABEL: "; correct the labels, or let the doctor leave those samples out",
    Cause.BAD_DATA: "; correct the data, or let the doctor leave those samples out",
    Cause.DEGENERATE_BATCH: "; choose a batch size that leaves no batch of one",
    Cause.LOSS_FUNCTION: "; write the loss so that it is defined for every output",
    Cause.PRECISION: "; compute in float32, or scale the loss",
    Cause.OPTIMIZER_STATE: "; begin with a fresh optimizer, and leave its eps above 0",
    Cause.RECEIVED_MODEL: "; the model was broken when it came: ask for another",
    Cause.BAD_INITIALISATION: "; initialise the weights anew",
    Cause.EXPLODING_GRADIENT: "; set clip_norm",
    Cause.LEARNING_RATE: "; lower lr",
    Cause.NOT_REPRODUCIBLE: "; something outside of the training changes it",
    Cause.UNKNOWN: "; lower lr or set clip_norm, and look for bad values in the data",
}

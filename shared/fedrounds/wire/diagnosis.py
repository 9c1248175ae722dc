"""A diagnosis as its message and back: both sides need both ways to be the same.

Said once, the forty names and fields can't come apart. What is read here keeps the limits of
fedrounds.wire.limits; whether modules and tensors are the model's, only the server can tell.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from fedrounds.diagnosis.values import (
    DIAGNOSIS_NUMBERS,
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Oddity,
    Origin,
    Remedy,
    RemedyKind,
    StepPhase,
    SuspectSample,
    Symptom,
    TrendPoint,
)
from fedrounds.errors import InvalidInput
from fedrounds.wire.enums import numbers_of
from fedrounds.wire.limits import validate_limits
from fedrounds.wire.pb import federation_pb2 as pb

_OPERATION = re.compile(r"[a-z0-9_]{0,64}")
_DTYPE = re.compile(r"[a-z0-9_]{0,16}")

E = TypeVar("E", bound=StrEnum)

_SYMPTOMS = numbers_of(Symptom, pb.Symptom)
_CAUSES = numbers_of(Cause, pb.Cause)
_PHASES = numbers_of(StepPhase, pb.StepPhase)
_ODDITIES = numbers_of(Oddity, pb.Oddity)
_EXPERIMENTS = numbers_of(ExperimentName, pb.ExperimentName)
_REMEDIES = numbers_of(RemedyKind, pb.RemedyKind)


def diagnosis_message(diagnosis: Diagnosis) -> pb.Diagnosis:
    """Return the message of a diagnosis."""
    assert diagnosis.detail.keys() <= DIAGNOSIS_NUMBERS, sorted(diagnosis.detail)
    origin, remedy = diagnosis.origin, diagnosis.remedy
    return pb.Diagnosis(
        symptom=_SYMPTOMS[diagnosis.symptom],
        cause=_CAUSES[diagnosis.cause],
        step=diagnosis.step,
        noticed_at_step=diagnosis.noticed_at_step,
        epoch=diagnosis.epoch,
        batch=diagnosis.batch,
        batch_size=diagnosis.batch_size,
        lr=diagnosis.lr,
        origin=pb.Origin(
            phase=_PHASES[origin.phase],
            module=origin.module,
            operation=_operation(origin.operation),
            tensor=origin.tensor,
            dtype=_dtype(origin.dtype),
            shape=origin.shape,
            num_nan=origin.num_nan,
            num_inf=origin.num_inf,
            first_index=origin.first_index,
        ),
        samples=[
            pb.SuspectSample(
                position=sample.position,
                index=sample.index,
                oddity=_ODDITIES[sample.oddity],
                value=sample.value,
            )
            for sample in diagnosis.samples
        ],
        num_samples=diagnosis.num_samples,
        experiments=[
            pb.Experiment(
                name=_EXPERIMENTS[experiment.name],
                healed=experiment.is_healed,
                value=experiment.value,
                loss=experiment.loss,
                failed_at_step=experiment.failed_at_step,
            )
            for experiment in diagnosis.experiments
        ],
        contributing=[_EXPERIMENTS[name] for name in diagnosis.contributing],
        trend=[
            pb.TrendPoint(
                step=point.step,
                loss=point.loss,
                grad_norm=point.grad_norm,
                largest_weight=point.largest_weight,
                lr=point.lr,
            )
            for point in diagnosis.trend
        ],
        remedy=pb.Remedy(
            kind=_REMEDIES[remedy.kind],
            value=remedy.value,
            oddity=_ODDITIES[remedy.oddity],
            working=remedy.is_working,
        ),
        returned_to_step=diagnosis.returned_to_step,
        num_replayed_steps=diagnosis.num_replayed_steps,
        seconds=diagnosis.seconds,
        detail=diagnosis.detail,
    )


def diagnosis_of(message: pb.Diagnosis) -> Diagnosis:
    """Return the diagnosis that a message holds.

    Raises:
        InvalidInput: a field is outside its limit, or a name isn't declared.
    """
    validate_limits(message)
    _validate_names(message)
    return Diagnosis(
        symptom=_member(_SYMPTOMS, message.symptom),
        cause=_member(_CAUSES, message.cause),
        step=message.step,
        noticed_at_step=message.noticed_at_step,
        epoch=message.epoch,
        batch=message.batch,
        batch_size=message.batch_size,
        lr=message.lr,
        origin=Origin(
            phase=_member(_PHASES, message.origin.phase),
            module=message.origin.module,
            operation=_operation(message.origin.operation),
            tensor=message.origin.tensor,
            dtype=_dtype(message.origin.dtype),
            shape=tuple(message.origin.shape),
            num_nan=message.origin.num_nan,
            num_inf=message.origin.num_inf,
            first_index=tuple(message.origin.first_index),
        ),
        samples=tuple(
            SuspectSample(
                position=sample.position,
                index=sample.index,
                oddity=_member(_ODDITIES, sample.oddity),
                value=sample.value,
            )
            for sample in message.samples
        ),
        num_samples=message.num_samples,
        experiments=tuple(
            Experiment(
                name=_member(_EXPERIMENTS, experiment.name),
                is_healed=experiment.healed,
                value=experiment.value,
                loss=experiment.loss,
                failed_at_step=experiment.failed_at_step,
            )
            for experiment in message.experiments
        ),
        contributing=tuple(_member(_EXPERIMENTS, number) for number in message.contributing),
        trend=tuple(
            TrendPoint(
                step=point.step,
                loss=point.loss,
                grad_norm=point.grad_norm,
                largest_weight=point.largest_weight,
                lr=point.lr,
            )
            for point in message.trend
        ),
        remedy=Remedy(
            kind=_member(_REMEDIES, message.remedy.kind),
            value=message.remedy.value,
            oddity=_member(_ODDITIES, message.remedy.oddity),
            is_working=message.remedy.working,
        ),
        returned_to_step=message.returned_to_step,
        num_replayed_steps=message.num_replayed_steps,
        seconds=message.seconds,
        detail=dict(message.detail),
    )


def _member(numbers: Mapping[E, int], number: int) -> E:
    for member, known in numbers.items():
        if known == number:
            return member
    kind = type(next(iter(numbers))).__name__
    raise InvalidInput(f"a diagnosis holds {kind} {number}, which there isn't")


def _operation(name: str) -> str:
    """Return the name of an operation, nothing if torch has none of that name.

    The name of an extension's operation may be any text. It isn't refused: the other side's torch
    may be newer.
    """
    # Imported late: a client reaches its server before it imports torch.
    import torch  # noqa: PLC0415

    is_known = isinstance(getattr(torch.ops.aten, name, None), torch._ops.OpOverloadPacket)
    return name if is_known else ""


def _dtype(name: str) -> str:
    """Return the name of a dtype, nothing if torch has none of that name."""
    import torch  # noqa: PLC0415

    return name if isinstance(getattr(torch, name, None), torch.dtype) else ""


def _validate_names(message: pb.Diagnosis) -> None:
    for what, pattern, text in (
        ("operation", _OPERATION, message.origin.operation),
        ("dtype", _DTYPE, message.origin.dtype),
    ):
        if not pattern.fullmatch(text):
            raise InvalidInput(f"a diagnosis names no {what} of torch; only its names are taken")
    if message.detail.keys() - DIAGNOSIS_NUMBERS:
        raise InvalidInput(
            "a diagnosis's detail holds a name that isn't declared; taken are "
            f"{', '.join(sorted(DIAGNOSIS_NUMBERS))}"
        )

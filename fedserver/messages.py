"""What the messages of federation.proto say, in the domain's terms, and the other way round."""

from dataclasses import asdict

from google.protobuf.duration_pb2 import Duration

from fedrounds.errors import InvalidInput
from fedrounds.types import (
    ClientUpdate,
    Compression,
    Encoding,
    EntryKind,
    Incident,
    IncidentKind,
    Section,
    WorkOrder,
)
from fedrounds.wire.diagnosis import diagnosis_of
from fedrounds.wire.pb import federation_pb2 as pb

_ENCODINGS = {
    pb.ENCODING_STATE_DICT: Encoding.STATE_DICT,
    pb.ENCODING_FLOAT16: Encoding.FLOAT16,
    pb.ENCODING_BFLOAT16: Encoding.BFLOAT16,
    pb.ENCODING_INT8: Encoding.INT8,
    pb.ENCODING_TOP_K: Encoding.TOP_K,
}
_ENCODING_NUMBERS = {encoding: number for number, encoding in _ENCODINGS.items()}
ENTRY_KINDS = {
    EntryKind.PARAMETER: pb.ENTRY_KIND_PARAMETER,
    EntryKind.MEAN: pb.ENTRY_KIND_MEAN,
    EntryKind.MAX: pb.ENTRY_KIND_MAX,
    EntryKind.KEEP: pb.ENTRY_KIND_KEEP,
    EntryKind.LOCAL: pb.ENTRY_KIND_LOCAL,
}
_INCIDENT_KINDS = {
    pb.INCIDENT_KIND_NON_FINITE_LOSS: IncidentKind.NON_FINITE_LOSS,
    pb.INCIDENT_KIND_NON_FINITE_GRADIENT: IncidentKind.NON_FINITE_GRADIENT,
    pb.INCIDENT_KIND_NON_FINITE_PARAMETER: IncidentKind.NON_FINITE_PARAMETER,
    pb.INCIDENT_KIND_TRAINING_FAILED: IncidentKind.TRAINING_FAILED,
    pb.INCIDENT_KIND_CLIENT_STATE_LOST: IncidentKind.CLIENT_STATE_LOST,
    pb.INCIDENT_KIND_TRAINING_DIAGNOSED: IncidentKind.TRAINING_DIAGNOSED,
}


def update_of(header: pb.UploadHeader) -> ClientUpdate:
    """Return what an upload's header says of its update.

    Raises:
        InvalidInput: its encoding isn't a declared one, or a digest isn't one.
    """
    if header.encoding not in _ENCODINGS:
        raise InvalidInput(
            "an upload begins with a header, whose encoding is one of federation.proto's, such "
            "as ENCODING_STATE_DICT"
        )
    return ClientUpdate(
        order_id=header.order_id,
        digest=digest_of(header.digest),
        size_bytes=header.size_bytes,
        sections=tuple(
            Section(
                name=one.name,
                digest=digest_of(one.digest) if one.digest else "",
                size_bytes=one.size_bytes,
            )
            for one in header.sections
        ),
        num_examples=header.num_examples,
        num_steps=header.num_steps,
        metrics=dict(header.metrics),
        encoding=_ENCODINGS[header.encoding],
    )


def digest_of(text: str) -> str:
    """Return `text` if it is a digest; it becomes part of a file's name.

    Raises:
        InvalidInput: it isn't one.
    """
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise InvalidInput(f"{text[:80]!r} isn't a digest of 64 lower-case hexadecimal digits")
    return text


def incident_of(message: pb.Incident) -> Incident:
    """Return what a client tells of an incident.

    Raises:
        InvalidInput: its kind or its diagnosis isn't a declared one.
    """
    if message.kind not in _INCIDENT_KINDS:
        raise InvalidInput(f"there is no incident kind {message.kind}")
    is_diagnosed = message.kind == pb.INCIDENT_KIND_TRAINING_DIAGNOSED
    if is_diagnosed != message.HasField("diagnosis"):
        raise InvalidInput(
            "INCIDENT_KIND_TRAINING_DIAGNOSED comes with a diagnosis, and no other kind does"
        )
    return Incident(
        kind=_INCIDENT_KINDS[message.kind],
        step=message.step if message.HasField("step") else None,
        epoch=message.epoch if message.HasField("epoch") else None,
        tensor=message.tensor if message.HasField("tensor") else None,
        detail=dict(message.detail),
        diagnosis=diagnosis_of(message.diagnosis) if is_diagnosed else None,
    )


def order_message(order: WorkOrder) -> pb.WorkOrder:
    """Return an order as it is sent."""
    training = order.training
    return pb.WorkOrder(
        order_id=order.order_id,
        client_id=order.client_id,
        round=order.round_number,
        attempt=order.attempt,
        sections=[
            pb.Section(name=one.name, digest=one.digest, size_bytes=one.size_bytes)
            for one in order.sections
        ],
        training=pb.TrainingConfig(
            epochs=training.epochs,
            batch_size=training.batch_size,
            optimizer=training.optimizer,
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            schedule=pb.Schedule(**asdict(training.schedule)),
            augmentation=training.augmentation,
            local_rule=(
                None
                if training.client_algorithm is None
                else pb.LocalRule(
                    name=training.client_algorithm.name,
                    parameters=training.client_algorithm.parameters,
                )
            ),
            work_deadline=(
                None if training.work_deadline_s is None else duration_of(training.work_deadline_s)
            ),
        ),
        seed=order.seed,
        last_counted_order_id=order.last_counted_order_id,
        evaluate=order.evaluate,
        holdout=order.holdout,
    )


def compression_message(compression: Compression) -> pb.Compression | None:
    """Return how a client is to compress, None for not at all."""
    if compression.encoding is Encoding.STATE_DICT:
        return None
    return pb.Compression(
        encoding=_ENCODING_NUMBERS[compression.encoding],
        block_size=compression.block_size,
        fraction=compression.fraction,
    )


def seconds_of(duration: Duration) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidInput: it is beyond what one can be.
    """
    try:
        return duration.ToTimedelta().total_seconds()
    except (OverflowError, ValueError) as error:
        raise InvalidInput(
            f"{duration.seconds} seconds and {duration.nanos} nanoseconds are no duration: {error}"
        ) from error


def duration_of(seconds: float) -> Duration:
    """Return so many seconds as they are sent."""
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

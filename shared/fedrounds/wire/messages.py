"""Translates the protocol's messages to the values of fedrounds.types and back.

Each message and enum is translated here for both directions, so that server and client can't come
apart. `..._message` makes a message, `..._of` reads it. Diagnoses: fedrounds.wire.diagnosis.
A reader raises InvalidInput for what a client may not send, WrongSettings for what a client can't
use of a server's answer. Limits: fedrounds.wire.limits.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from google.protobuf.duration_pb2 import Duration

from fedrounds.errors import InvalidInput, WrongSettings
from fedrounds.escaping import printable
from fedrounds.types import (
    NO_COMPRESSION,
    ClientAlgorithmConfig,
    ClientUpdate,
    Compression,
    Counters,
    Encoding,
    EntryKind,
    Incident,
    IncidentKind,
    Leave,
    LeaveReason,
    OrderEnd,
    Partitioning,
    Receipt,
    Registration,
    RunEnd,
    RunFailure,
    Schedule,
    Section,
    SessionInfo,
    TrainingConfig,
    UploadAnswer,
    Waiting,
    Work,
    WorkOrder,
    WorkState,
)
from fedrounds.wire.diagnosis import diagnosis_message, diagnosis_of
from fedrounds.wire.enums import members_of, numbers_of
from fedrounds.wire.pb import federation_pb2 as pb

REPORTED_KINDS = (
    IncidentKind.NON_FINITE_LOSS,
    IncidentKind.NON_FINITE_GRADIENT,
    IncidentKind.NON_FINITE_PARAMETER,
    IncidentKind.TRAINING_FAILED,
    IncidentKind.CLIENT_STATE_LOST,
    IncidentKind.TRAINING_DIAGNOSED,
)
"""The kinds of incidents that clients report; the server records the others itself."""

_WORK_STATES = numbers_of(WorkState, pb.WorkState)
_FAILURES = numbers_of(RunFailure, pb.RunFailure)
_RECEIPTS = numbers_of(Receipt, pb.Receipt)
_LEAVE_REASONS = numbers_of(LeaveReason, pb.LeaveReason)
_ENCODINGS = numbers_of(Encoding, pb.Encoding)
_ENTRY_KINDS = numbers_of(EntryKind, pb.EntryKind)
_INCIDENT_KINDS = numbers_of(IncidentKind, pb.IncidentKind, REPORTED_KINDS)
_ORDER_ENDS = {
    **numbers_of(OrderEnd, pb.OrderEnd, [end for end in OrderEnd if end is not OrderEnd.OTHER]),
    OrderEnd.OTHER: pb.ORDER_END_UNSPECIFIED,
}

_MEMBERS_OF_STATES = members_of(_WORK_STATES)
_MEMBERS_OF_FAILURES = members_of(_FAILURES)
_MEMBERS_OF_RECEIPTS = members_of(_RECEIPTS)
_MEMBERS_OF_REASONS = members_of(_LEAVE_REASONS)
_MEMBERS_OF_ENCODINGS = members_of(_ENCODINGS)
_MEMBERS_OF_KINDS = members_of(_ENTRY_KINDS)
_MEMBERS_OF_INCIDENTS = members_of(_INCIDENT_KINDS)
_MEMBERS_OF_ENDS = members_of(_ORDER_ENDS)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ORDER_ID = re.compile(r"[\w-]{1,200}", re.ASCII)


# ---- Register


def registration_message(registration: Registration) -> pb.RegisterRequest:
    """Return the request that registers a client."""
    return pb.RegisterRequest(
        client_ids=registration.client_ids,
        instance_key=registration.instance_key,
        software_version=registration.software_version,
        task=registration.task,
        num_examples=registration.num_examples,
        capabilities=registration.capabilities,
        process_key=registration.process_key,
    )


def registration_of(message: pb.RegisterRequest) -> Registration:
    """Return the registration that a request holds."""
    return Registration(
        client_ids=tuple(message.client_ids),
        instance_key=message.instance_key,
        software_version=message.software_version,
        task=message.task,
        num_examples=tuple(message.num_examples),
        capabilities=tuple(message.capabilities),
        process_key=message.process_key,
    )


def session_message(session: SessionInfo) -> pb.RegisterResponse:
    """Return the answer to a registration."""
    return pb.RegisterResponse(
        session_id=session.session_id,
        run_id=session.run_id,
        task=session.task,
        partitioning=pb.Partitioning(
            scheme=session.partitioning.scheme,
            num_partitions=session.partitioning.num_partitions,
            seed=session.partitioning.seed,
            parameters=session.partitioning.parameters,
        ),
        max_wait=duration_message(session.max_wait_s),
        lease=duration_message(session.lease_s),
        total_rounds=session.total_rounds,
        compression=_compression_message(session.compression),
        entry_kinds={name: _ENTRY_KINDS[kind] for name, kind in session.entry_kinds.items()},
    )


def session_of(message: pb.RegisterResponse) -> SessionInfo:
    """Return the session that an answer opens.

    Raises:
        WrongSettings: an entry is aggregated in a way that this software doesn't know.
    """
    return SessionInfo(
        session_id=message.session_id,
        run_id=message.run_id,
        task=message.task,
        partitioning=Partitioning(
            scheme=message.partitioning.scheme,
            num_partitions=message.partitioning.num_partitions,
            seed=message.partitioning.seed,
            parameters=dict(message.partitioning.parameters),
        ),
        max_wait_s=seconds_of(message.max_wait),
        lease_s=seconds_of(message.lease),
        total_rounds=message.total_rounds,
        compression=_compression_of(message.compression),
        entry_kinds=_entry_kinds_of(message.entry_kinds),
    )


def _compression_message(compression: Compression) -> pb.Compression | None:
    if compression.encoding is Encoding.STATE_DICT:
        return None
    return pb.Compression(
        encoding=_ENCODINGS[compression.encoding],
        block_size=compression.block_size,
        fraction=compression.fraction,
    )


def _compression_of(message: pb.Compression) -> Compression:
    """Return how to compress updates; an encoding that isn't known: not at all."""
    if message.encoding not in _MEMBERS_OF_ENCODINGS:
        return NO_COMPRESSION
    return Compression(
        encoding=_MEMBERS_OF_ENCODINGS[message.encoding],
        block_size=message.block_size,
        fraction=message.fraction,
    )


def _entry_kinds_of(message: "Mapping[str, pb.EntryKind.ValueType]") -> dict[str, EntryKind]:
    for name, number in message.items():
        if number not in _MEMBERS_OF_KINDS:
            raise WrongSettings(
                f"the server aggregates entry {name!r} in a way (number {number}) that this client "
                "doesn't know; update it"
            )
    return {name: _MEMBERS_OF_KINDS[number] for name, number in message.items()}


# ---- PullWork


def work_message(work: Work) -> pb.PullWorkResponse:
    """Return the answer to a pull for work."""
    run_end = work.run_end
    response = pb.PullWorkResponse(
        state=_WORK_STATES[work.state],
        order=None if work.order is None else order_message(work.order),
        waiting=None if work.waiting is None else _waiting_message(work.waiting),
    )
    if run_end is not None:
        response.outcome = pb.RUN_OUTCOME_FAILED if run_end.has_failed else pb.RUN_OUTCOME_FINISHED
        if run_end.failure is not None:
            response.failure = _FAILURES[run_end.failure]
    return response


def work_of(message: pb.PullWorkResponse) -> Work:
    """Return the work that an answer holds.

    Raises:
        WrongSettings: its state isn't known, or its order names what can't be a file here.
    """
    if message.state not in _MEMBERS_OF_STATES:
        raise WrongSettings(f"the server answers state {message.state}; update this client")
    is_finished = message.state == pb.WORK_STATE_FINISHED
    return Work(
        state=_MEMBERS_OF_STATES[message.state],
        order=order_of(message.order) if message.HasField("order") else None,
        run_end=_run_end_of(message) if is_finished else None,
        waiting=_waiting_of(message.waiting) if message.HasField("waiting") else None,
    )


def _run_end_of(message: pb.PullWorkResponse) -> RunEnd:
    """Return how a run ended; an older server leaves it out, which means that the run is done."""
    return RunEnd(
        has_failed=message.outcome == pb.RUN_OUTCOME_FAILED,
        failure=_MEMBERS_OF_FAILURES.get(message.failure),
    )


def _waiting_message(waiting: Waiting) -> pb.Waiting:
    return pb.Waiting(
        round=waiting.round_number,
        clients_here=waiting.clients_here,
        clients_needed=waiting.clients_needed,
    )


def _waiting_of(message: pb.Waiting) -> Waiting:
    return Waiting(
        round_number=message.round,
        clients_here=message.clients_here,
        clients_needed=message.clients_needed,
    )


def order_message(order: WorkOrder) -> pb.WorkOrder:
    """Return the message of an order."""
    return pb.WorkOrder(
        order_id=order.order_id,
        client_id=order.client_id,
        round=order.round_number,
        attempt=order.attempt,
        sections=_section_messages(order.sections),
        training=_training_message(order.training),
        seed=order.seed,
        last_counted_order_id=order.last_counted_order_id,
        evaluate=order.evaluate,
        holdout=order.holdout,
    )


def order_of(message: pb.WorkOrder) -> WorkOrder:
    """Return the order that a message holds.

    Raises:
        WrongSettings: a digest or an order's id is malformed; they become names of files.
    """
    for digest in (section.digest for section in message.sections):
        if not _DIGEST.fullmatch(digest):
            raise WrongSettings(f"the server's order names {digest[:80]!r}, which is no digest")
    for order_id in (message.order_id, message.last_counted_order_id or message.order_id):
        if not _ORDER_ID.fullmatch(order_id):
            raise WrongSettings(f"the server's order has the id {order_id[:80]!r}, which is none")
    return WorkOrder(
        order_id=message.order_id,
        client_id=message.client_id,
        round_number=message.round,
        attempt=message.attempt,
        sections=tuple(
            Section(name=section.name, digest=section.digest, size_bytes=section.size_bytes)
            for section in message.sections
        ),
        training=_training_of(message.training),
        seed=message.seed,
        last_counted_order_id=message.last_counted_order_id,
        evaluate=message.evaluate,
        holdout=message.holdout,
    )


def _training_message(training: TrainingConfig) -> pb.TrainingConfig:
    algorithm, deadline_s = training.client_algorithm, training.work_deadline_s
    return pb.TrainingConfig(
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
            if algorithm is None
            else pb.LocalRule(name=algorithm.name, parameters=algorithm.parameters)
        ),
        work_deadline=None if deadline_s is None else duration_message(deadline_s),
    )


def _training_of(message: pb.TrainingConfig) -> TrainingConfig:
    """Return how to train; an older server sends neither schedule nor augmentation."""
    algorithm = message.local_rule
    return TrainingConfig(
        epochs=message.epochs,
        batch_size=message.batch_size,
        optimizer=message.optimizer,
        lr=message.lr,
        momentum=message.momentum,
        weight_decay=message.weight_decay,
        clip_norm=message.clip_norm if message.HasField("clip_norm") else None,
        schedule=_schedule_of(message.schedule) if message.HasField("schedule") else Schedule(),
        augmentation=message.augmentation or "none",
        client_algorithm=(
            ClientAlgorithmConfig(name=algorithm.name, parameters=dict(algorithm.parameters))
            if message.HasField("local_rule")
            else None
        ),
        work_deadline_s=(
            seconds_of(message.work_deadline) if message.HasField("work_deadline") else None
        ),
    )


def _schedule_of(message: pb.Schedule) -> Schedule:
    return Schedule(
        name=message.name,
        warmup_epochs=message.warmup_epochs,
        decay_epochs=message.decay_epochs,
        decay=message.decay,
        first_epoch=message.first_epoch,
        total_epochs=message.total_epochs,
    )


# ---- UploadUpdate


def upload_header(session_id: str, update: ClientUpdate, *, offset: int) -> pb.UploadHeader:
    """Return the header of an upload that sends an update's bytes from `offset` on."""
    return pb.UploadHeader(
        session_id=session_id,
        order_id=update.order_id,
        digest=update.digest,
        size_bytes=update.size_bytes,
        offset=offset,
        sections=_section_messages(update.sections),
        encoding=_ENCODINGS[update.encoding],
        num_examples=update.num_examples,
        num_steps=update.num_steps,
        metrics=update.metrics,
        measurements=[pb.Measurement(name=n, values=v) for n, v in update.measurements.items()],
    )


def update_of(header: pb.UploadHeader) -> ClientUpdate:
    """Return the update that an upload's header declares.

    Raises:
        InvalidInput: its encoding isn't declared, or a digest is malformed.
    """
    if header.encoding not in _MEMBERS_OF_ENCODINGS:
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
                name=section.name,
                digest=digest_of(section.digest) if section.digest else "",
                size_bytes=section.size_bytes,
            )
            for section in header.sections
        ),
        num_examples=header.num_examples,
        num_steps=header.num_steps,
        metrics=dict(header.metrics),
        measurements={sent.name: tuple(sent.values) for sent in header.measurements},
        encoding=_MEMBERS_OF_ENCODINGS[header.encoding],
    )


def receipt_message(answer: UploadAnswer) -> pb.UploadUpdateResponse:
    """Return the answer to an upload."""
    return pb.UploadUpdateResponse(
        receipt=_RECEIPTS[answer.receipt],
        reason=answer.reason,
        order_end=_ORDER_ENDS[answer.order_end or OrderEnd.OTHER],
    )


def receipt_of(message: pb.UploadUpdateResponse) -> UploadAnswer:
    """Return the receipt that an answer holds.

    Raises:
        WrongSettings: the receipt isn't known.
    """
    if message.receipt not in _MEMBERS_OF_RECEIPTS:
        raise WrongSettings(f"the server answers receipt {message.receipt}; update this client")
    receipt = _MEMBERS_OF_RECEIPTS[message.receipt]
    return UploadAnswer(
        receipt=receipt,
        reason=printable(message.reason),
        order_end=_order_end_of(message.order_end) if receipt is Receipt.LATE else None,
    )


def _order_end_of(number: int) -> OrderEnd:
    return _MEMBERS_OF_ENDS.get(number, OrderEnd.OTHER)


def _section_messages(sections: Iterable[Section]) -> list[pb.Section]:
    return [
        pb.Section(name=section.name, digest=section.digest, size_bytes=section.size_bytes)
        for section in sections
    ]


def digest_of(text: str) -> str:
    """Return `text` if it is a digest; it becomes part of a file's name.

    Raises:
        InvalidInput: the text is no digest.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} isn't a digest of 64 lower-case hexadecimal digits")
    return text


# ---- ReportProgress


def progress_message(
    session_id: str,
    order_id: str,
    *,
    counters: Counters,
    incidents: Sequence[tuple[int, Incident]],
    gave_up: bool,
) -> pb.ReportProgressRequest:
    """Return a report of progress; each incident comes with its number in the order, from 1."""
    return pb.ReportProgressRequest(
        session_id=session_id,
        order_id=order_id,
        counters=pb.Counters(
            bytes_received=counters.bytes_received,
            bytes_sent=counters.bytes_sent,
            batches=counters.batches,
            batches_total=counters.batches_total,
            replays=counters.replays,
            evaluation_batches=counters.evaluation_batches,
            evaluation_batches_total=counters.evaluation_batches_total,
        ),
        incidents=[_incident_message(sequence, incident) for sequence, incident in incidents],
        gave_up=gave_up,
    )


def counters_of(message: pb.Counters) -> Counters:
    """Return the counters that a message holds."""
    return Counters(
        bytes_received=message.bytes_received,
        bytes_sent=message.bytes_sent,
        batches=message.batches,
        batches_total=message.batches_total,
        replays=message.replays,
        evaluation_batches=message.evaluation_batches,
        evaluation_batches_total=message.evaluation_batches_total,
    )


def _incident_message(sequence: int, incident: Incident) -> pb.Incident:
    message = pb.Incident(
        sequence=sequence,
        kind=_INCIDENT_KINDS[incident.kind],
        step=incident.step,
        epoch=incident.epoch,
        tensor=incident.tensor,
        detail=incident.detail,
        diagnosis=None if incident.diagnosis is None else diagnosis_message(incident.diagnosis),
    )
    message.at.GetCurrentTime()
    return message


def incident_of(message: pb.Incident) -> Incident:
    """Return the incident that a message holds.

    Raises:
        InvalidInput: its kind or its diagnosis isn't declared.
    """
    if message.kind not in _MEMBERS_OF_INCIDENTS:
        raise InvalidInput(f"there is no incident kind {message.kind}")
    is_diagnosed = message.kind == pb.INCIDENT_KIND_TRAINING_DIAGNOSED
    if is_diagnosed != message.HasField("diagnosis"):
        raise InvalidInput(
            "INCIDENT_KIND_TRAINING_DIAGNOSED comes with a diagnosis, and no other kind does"
        )
    return Incident(
        kind=_MEMBERS_OF_INCIDENTS[message.kind],
        step=message.step if message.HasField("step") else None,
        epoch=message.epoch if message.HasField("epoch") else None,
        tensor=message.tensor if message.HasField("tensor") else None,
        detail=dict(message.detail),
        diagnosis=diagnosis_of(message.diagnosis) if is_diagnosed else None,
    )


def order_end_message(order_end: OrderEnd | None) -> pb.ReportProgressResponse:
    """Return the answer to a report: go on with the order, or how it has ended."""
    if order_end is None:
        return pb.ReportProgressResponse(directive=pb.DIRECTIVE_CONTINUE)
    return pb.ReportProgressResponse(
        directive=pb.DIRECTIVE_ABANDON, order_end=_ORDER_ENDS[order_end]
    )


def order_end_of(message: pb.ReportProgressResponse) -> OrderEnd | None:
    """Return how the order has ended by the answer to a report; None: it goes on."""
    if message.directive == pb.DIRECTIVE_CONTINUE:
        return None
    return _order_end_of(message.order_end)


# ---- Leave


def leave_message(session_id: str, leave: Leave) -> pb.LeaveRequest:
    """Return the request by which a client leaves the run."""
    return pb.LeaveRequest(
        session_id=session_id,
        client_ids=leave.client_ids,
        reason=_LEAVE_REASONS[leave.reason],
        coming_back=leave.coming_back,
        kept_order_ids=leave.kept_order_ids,
    )


def leave_of(message: pb.LeaveRequest) -> Leave:
    """Return who leaves and why.

    Raises:
        InvalidInput: the reason isn't declared.
    """
    if message.reason not in _MEMBERS_OF_REASONS:
        raise InvalidInput(
            f"there is no reason {message.reason} to leave; say LEAVE_REASON_STOPPED or "
            "another one of federation.proto's"
        )
    return Leave(
        reason=_MEMBERS_OF_REASONS[message.reason],
        client_ids=tuple(message.client_ids),
        coming_back=message.coming_back,
        kept_order_ids=tuple(message.kept_order_ids),
    )


# ---- durations


def duration_message(seconds: float) -> Duration:
    """Return the message of a duration in seconds."""
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def seconds_of(message: Duration) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidInput: it is beyond what a duration can be, or its parts differ in sign.
    """
    if message.seconds * message.nanos < 0:
        raise InvalidInput(
            f"{message.seconds} seconds and {message.nanos} nanoseconds are no duration: the signs "
            "differ"
        )
    try:
        return message.ToTimedelta().total_seconds()
    except (OverflowError, ValueError) as error:
        raise InvalidInput(
            f"{message.seconds} seconds and {message.nanos} nanoseconds are no duration: {error}"
        ) from error

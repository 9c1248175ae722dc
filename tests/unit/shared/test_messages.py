"""Each message arrives as the value it was made of; what one side doesn't know is said."""

from enum import StrEnum

import pytest

from fedrounds.errors import InvalidInput, WrongSettings
from fedrounds.types import (
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
    Section,
    SessionInfo,
    UploadAnswer,
    Waiting,
    Work,
    WorkState,
)
from fedrounds.wire.messages import (
    REPORTED_KINDS,
    counters_of,
    duration_message,
    incident_of,
    leave_message,
    leave_of,
    order_end_message,
    order_end_of,
    order_message,
    order_of,
    progress_message,
    receipt_message,
    receipt_of,
    registration_message,
    registration_of,
    seconds_of,
    session_message,
    session_of,
    update_of,
    upload_header,
    work_message,
    work_of,
)
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis, make_order

DIGEST = "ab" * 32
UNKNOWN = 99
"""A number that none of the protocol's enums has."""


def names_of(enum: str) -> set[str]:
    """Return the names of the protocol's values without their prefix, but for UNSPECIFIED."""
    names = [value.name for value in pb.DESCRIPTOR.enum_types_by_name[enum].values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    return {name.removeprefix(prefix) for name in names[1:]}


@pytest.mark.parametrize(
    "enum",
    [WorkState, RunFailure, Receipt, LeaveReason, OrderEnd, Encoding, EntryKind],
    ids=lambda enum: enum.__name__,
)
def test_each_value_of_the_protocol_has_a_member(enum: type[StrEnum]) -> None:
    """And each member a value: a value added to federation.proto alone is noticed here."""
    assert names_of(enum.__name__) == {member.name for member in enum} - {"OTHER"}


def test_the_kinds_that_clients_report_are_the_protocols() -> None:
    """The others are the server's own."""
    assert names_of("IncidentKind") == {kind.name for kind in REPORTED_KINDS}


def test_a_registration_arrives_as_it_was_sent() -> None:
    """With every field given."""
    registration = Registration(
        client_ids=(3, 4),
        instance_key="key",
        software_version="1.2",
        task="mnist",
        num_examples=(10, 20),
        capabilities=("int8",),
        process_key="process",
    )
    assert registration_of(registration_message(registration)) == registration


def a_session(**changes: object) -> SessionInfo:
    """Return an answer to a registration with every field given, and `changes`."""
    fields: dict[str, object] = {
        "session_id": "s",
        "run_id": "run1",
        "task": "mnist",
        "partitioning": Partitioning(
            scheme="dirichlet", num_partitions=7, seed=3, parameters={"alpha": 0.5}
        ),
        "max_wait_s": 12.5,
        "lease_s": 30.25,
        "total_rounds": 9,
        "compression": Compression(encoding=Encoding.TOP_K, block_size=64, fraction=0.25),
        "entry_kinds": {kind.name: kind for kind in EntryKind},
    }
    return SessionInfo(**(fields | changes))  # type: ignore[arg-type]  # each is what its name says


@pytest.mark.parametrize("encoding", Encoding)
def test_a_session_arrives_as_it_was_sent(encoding: Encoding) -> None:
    """With each encoding; without compression its other numbers aren't sent."""
    compression = (
        Compression()
        if encoding is Encoding.STATE_DICT
        else Compression(encoding=encoding, block_size=64, fraction=0.25)
    )
    session = a_session(compression=compression)
    assert session_of(session_message(session)) == session


def test_a_client_that_does_not_know_an_encoding_does_not_compress() -> None:
    """It is an optional way of sending; the whole state_dict is always taken."""
    message = session_message(a_session())
    message.compression.encoding = UNKNOWN  # type: ignore[assignment]  # of a later version
    assert session_of(message).compression == Compression()


def test_a_client_that_does_not_know_an_entry_kind_says_which_entry() -> None:
    """It can't train that model rightly."""
    message = session_message(a_session())
    message.entry_kinds["scale"] = UNKNOWN  # type: ignore[assignment]  # of a later version
    with pytest.raises(WrongSettings, match=r"entry 'scale' .*number 99"):
        session_of(message)


@pytest.mark.parametrize(
    "work",
    [
        Work(state=WorkState.ORDER, order=make_order()),
        Work(state=WorkState.WAIT),
        Work(
            state=WorkState.WAIT,
            waiting=Waiting(round_number=3, clients_here=1, clients_needed=2),
        ),
        Work(state=WorkState.FINISHED, run_end=RunEnd(has_failed=False)),
        Work(state=WorkState.FINISHED, run_end=RunEnd(has_failed=True)),
        *(
            Work(state=WorkState.FINISHED, run_end=RunEnd(has_failed=True, failure=failure))
            for failure in RunFailure
        ),
    ],
    ids=str,
)
def test_work_arrives_as_it_was_sent(work: Work) -> None:
    """Orders, waiting, and each end of a run."""
    assert work_of(work_message(work)) == work


def test_an_unknown_work_state_asks_for_a_newer_client() -> None:
    """The number is named."""
    with pytest.raises(WrongSettings, match="state 99; update this client"):
        work_of(pb.PullWorkResponse(state=UNKNOWN))  # type: ignore[arg-type]  # of a later version


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("order_id", "../up"),
        ("order_id", ""),
        ("last_counted_order_id", "a/b"),
        ("order_id", "x" * 201),
    ],
)
def test_an_order_whose_id_can_not_name_a_file_is_refused(field: str, text: str) -> None:
    """A client keeps what an order gives under its id."""
    message = order_message(make_order())
    setattr(message, field, text)
    with pytest.raises(WrongSettings, match="which is none"):
        order_of(message)


@pytest.mark.parametrize("digest", ["", "AB" * 32, "ab" * 31 + "/.", DIGEST + "\n"])
def test_an_order_whose_digest_is_none_is_refused(digest: str) -> None:
    """It becomes a file's name in the cache."""
    message = order_message(make_order())
    message.sections.add(name="model", digest=digest, size_bytes=1)
    with pytest.raises(WrongSettings, match="which is no digest"):
        order_of(message)


@pytest.mark.parametrize("encoding", Encoding)
def test_an_update_arrives_as_its_header_declares_it(encoding: Encoding) -> None:
    """With two sections, one of them without a digest of its own."""
    update = ClientUpdate(
        order_id="o",
        digest=DIGEST,
        size_bytes=12,
        sections=(
            Section(name="model", digest=DIGEST, size_bytes=8),
            Section(name="control", digest="", size_bytes=4),
        ),
        num_examples=5,
        num_steps=6,
        metrics={"loss": 0.5},
        measurements={"f1/tp": (1.0, 2.0), "auc": (0.5,)},
        encoding=encoding,
    )
    header = upload_header("session", update, offset=7)
    assert (header.session_id, header.offset) == ("session", 7)
    assert update_of(header) == update


def test_a_header_without_a_declared_encoding_is_refused() -> None:
    """Zero is an error, as everywhere in the protocol."""
    with pytest.raises(InvalidInput, match="whose encoding is one of"):
        update_of(pb.UploadHeader(order_id="o", digest=DIGEST))


@pytest.mark.parametrize("end", OrderEnd)
def test_a_late_receipt_says_how_the_order_had_ended(end: OrderEnd) -> None:
    """Each end arrives; the others' receipts have none."""
    late = UploadAnswer(receipt=Receipt.LATE, order_end=end)
    assert receipt_of(receipt_message(late)) == late
    refused = UploadAnswer(receipt=Receipt.REFUSED, reason="why")
    assert receipt_of(receipt_message(refused)) == refused


def test_a_receipt_is_read_with_care() -> None:
    """Its text is shown to a person, and it may be of a later version."""
    colored = pb.UploadUpdateResponse(receipt=pb.RECEIPT_REFUSED, reason="\x1b[31mred")
    assert "\x1b" not in receipt_of(colored).reason
    with pytest.raises(WrongSettings, match="receipt 99; update this client"):
        receipt_of(pb.UploadUpdateResponse(receipt=UNKNOWN))  # type: ignore[arg-type]
    later = pb.UploadUpdateResponse(receipt=pb.RECEIPT_LATE, order_end=UNKNOWN)  # type: ignore[arg-type]
    assert receipt_of(later).order_end is OrderEnd.OTHER


def an_incident(kind: IncidentKind) -> Incident:
    """Return an incident of a kind, with every field given."""
    return Incident(
        kind=kind,
        step=3,
        epoch=2,
        tensor="fc.weight",
        detail={"loss": 0.5},
        diagnosis=make_diagnosis() if kind is IncidentKind.TRAINING_DIAGNOSED else None,
    )


def test_progress_arrives_as_it_was_reported() -> None:
    """All counters, and each kind of incident with its number and the moment."""
    counters = Counters(
        bytes_received=1,
        bytes_sent=2,
        batches=3,
        batches_total=4,
        replays=5,
        evaluation_batches=6,
        evaluation_batches_total=7,
    )
    incidents = [*enumerate(map(an_incident, REPORTED_KINDS), 1)]
    bare = (7, Incident(kind=IncidentKind.TRAINING_FAILED))
    message = progress_message(
        "session", "order", counters=counters, incidents=[*incidents, bare], gave_up=True
    )
    assert (message.session_id, message.order_id, message.gave_up) == ("session", "order", True)
    assert counters_of(message.counters) == counters
    read = [(incident.sequence, incident_of(incident)) for incident in message.incidents]
    # As text, in which the diagnosis's NaN equals itself.
    assert str(read) == str([*incidents, bare])
    assert all(incident.at.seconds > 0 for incident in message.incidents)


def test_only_incidents_of_the_kind_diagnosed_have_a_diagnosis() -> None:
    """Neither comes without the other, and the kind must be a declared one."""
    diagnosed = progress_message(
        "s",
        "o",
        counters=Counters(),
        incidents=[(1, an_incident(IncidentKind.TRAINING_DIAGNOSED))],
        gave_up=False,
    ).incidents[0]
    diagnosed.kind = pb.INCIDENT_KIND_TRAINING_FAILED
    with pytest.raises(InvalidInput, match="comes with a diagnosis, and no other kind does"):
        incident_of(diagnosed)
    with pytest.raises(InvalidInput, match="comes with a diagnosis"):
        incident_of(pb.Incident(kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED))
    with pytest.raises(InvalidInput, match="no incident kind 99"):
        incident_of(pb.Incident(kind=UNKNOWN))  # type: ignore[arg-type]


def test_the_answer_to_a_report_says_whether_the_order_goes_on() -> None:
    """None is to go on; an end that a later version has added is the unknown end."""
    for end in (None, *OrderEnd):
        assert order_end_of(order_end_message(end)) is end
    later = pb.ReportProgressResponse(directive=pb.DIRECTIVE_ABANDON, order_end=UNKNOWN)  # type: ignore[arg-type]
    assert order_end_of(later) is OrderEnd.OTHER


@pytest.mark.parametrize("reason", LeaveReason)
def test_a_leave_arrives_as_it_was_sent(reason: LeaveReason) -> None:
    """Each reason; without a declared one it is refused."""
    leave = Leave(reason=reason, client_ids=(1, 2), coming_back=True, kept_order_ids=("o",))
    message = leave_message("session", leave)
    assert message.session_id == "session"
    assert leave_of(message) == leave
    with pytest.raises(InvalidInput, match="no reason 0 to leave"):
        leave_of(pb.LeaveRequest(session_id="session"))


def test_seconds_arrive_as_they_were_sent() -> None:
    """And what is no duration is refused, not raised as another error."""
    assert seconds_of(duration_message(90.25)) == 90.25
    endless = duration_message(0)
    endless.seconds = 2**62
    with pytest.raises(InvalidInput, match="are no duration"):
        seconds_of(endless)


def test_a_duration_whose_parts_differ_in_sign_is_refused() -> None:
    contradictory = duration_message(1)
    contradictory.nanos = -5
    with pytest.raises(InvalidInput, match="the signs differ"):
        seconds_of(contradictory)

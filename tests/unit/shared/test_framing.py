"""Chunks read and written by hand: the bytes that protobuf writes, and all that it reads."""

import itertools

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.errors import InvalidInput
from fedrounds.wire.framing import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    frame_download,
    frame_upload,
    unframe_download,
    unframe_upload,
)
from fedrounds.wire.pb import federation_pb2 as pb

# A varint holds 7 bits a byte, so the length's own size changes at 2^7, 2^14 and 2^21.
BORDERS = sorted(
    {0, 1, CHUNK_BYTES, MAX_CHUNK_BYTES}
    | {2**power + step for power in (7, 14, 21) for step in (-2, -1, 0, 1)}
)
VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)


def varint(number: int, *, padding: int = 0) -> bytes:
    """Return a number as a varint, with `padding` bytes more than it needs, 10 in all at most."""
    sevens = [number & 0x7F]
    while number := number >> 7:
        sevens.append(number & 0x7F)
    sevens += [0] * min(padding, 10 - len(sevens))
    return bytes([*(bits | 0x80 for bits in sevens[:-1]), sevens[-1]])


def field(number: int, kind: int, content: bytes, *, padding: int = 0) -> bytes:
    """Return a field with its tag, whose varint may be longer than it needs to be."""
    return varint(number << 3 | kind, padding=padding) + content


PADDING = st.integers(0, 4)


@st.composite
def bytes_field(draw: st.DrawFn, number: int) -> bytes:
    """Draw a field of bytes whose tag and length may be longer than they need to be."""
    data = draw(st.binary(max_size=20))
    length = varint(len(data), padding=draw(PADDING))
    # A tag has 5 bytes at most.
    return field(number, BYTES, length + data, padding=draw(PADDING))


@st.composite
def unknown_field(draw: st.DrawFn) -> bytes:
    """Draw a field that neither message has, of any kind that the wire knows."""
    number = draw(st.integers(3, 2**29 - 1))
    match draw(st.sampled_from([VARINT, FIXED64, BYTES, GROUP, FIXED32])):
        case 0:
            return field(number, VARINT, varint(draw(st.integers(0, 2**64 - 1))))
        case 1:
            return field(number, FIXED64, draw(st.binary(min_size=8, max_size=8)))
        case 2:
            return draw(bytes_field(number))
        case 3:
            inside = draw(st.lists(bytes_field(3), max_size=2))
            return field(number, GROUP, b"".join(inside)) + field(number, END_GROUP, b"")
        case _:
            return field(number, FIXED32, draw(st.binary(min_size=4, max_size=4)))


MESSAGES = st.lists(st.one_of(bytes_field(1), bytes_field(2), unknown_field()), max_size=5).map(
    b"".join
)
"""What protobuf reads, but for a field 1 that isn't a header where one is expected."""


def spoilt(message: bytes, at: int, byte: int, cut: int) -> bytes:
    """Return a message with one byte changed and some cut off."""
    at %= len(message) + 1
    return (message[:at] + bytes([byte]) + message[at + 1 :])[: len(message) - cut]


ANY_BYTES = st.one_of(
    MESSAGES,
    st.binary(max_size=40),
    st.builds(spoilt, MESSAGES, st.integers(0, 100), st.integers(0, 255), st.integers(0, 3)),
)


@pytest.mark.parametrize("size", BORDERS)
def test_a_frame_is_what_protobuf_would_write(size: int) -> None:
    """Both messages, at every border of the length's varint, byte for byte; and back again."""
    data = bytes(range(251)) * (size // 251) + b"\xff" * (size % 251)
    download, upload = frame_download(data), frame_upload(memoryview(data))
    if data:
        # Protobuf leaves an empty field out where it is no part of a oneof, and reads either.
        assert download == pb.DownloadBlobResponse(data=data).SerializeToString()
    assert pb.DownloadBlobResponse.FromString(download).data == data
    assert upload == pb.UploadUpdateRequest(data=data).SerializeToString()
    for unframed, framed in (
        (unframe_download(download), download),
        (unframe_upload(upload), upload),
    ):
        assert unframed == data
        assert unframed.obj is framed, "the bytes were copied"


@given(message=ANY_BYTES)
def test_a_download_is_read_as_protobuf_reads_it(message: bytes) -> None:
    """The same messages are taken, and with the same data."""
    try:
        expected = pb.DownloadBlobResponse.FromString(message).data
    except DecodeError:
        with pytest.raises(InvalidInput, match="aren't a DownloadBlobResponse"):
            unframe_download(message)
    else:
        assert unframe_download(message) == expected


@given(message=ANY_BYTES)
def test_an_upload_is_read_as_protobuf_reads_it(message: bytes) -> None:
    """The same messages are taken, and with the same data; a header isn't data."""
    try:
        parsed = pb.UploadUpdateRequest.FromString(message)
    except DecodeError:
        with pytest.raises(InvalidInput, match="aren't an UploadUpdateRequest"):
            unframe_upload(message)
        return
    if parsed.HasField("header"):
        with pytest.raises(InvalidInput, match="an upload has one header"):
            unframe_upload(message)
    else:
        assert unframe_upload(message) == parsed.data


def test_a_field_that_a_newer_peer_adds_is_passed_over() -> None:
    """Before the data, behind it, or in place of it; the last of several data fields counts."""
    data, new = field(1, BYTES, b"\x03abc"), field(7, VARINT, varint(2**40))
    for message in itertools.permutations((field(1, BYTES, b"\x01x"), new, data)):
        last = b"abc" if message.index(data) > message.index(field(1, BYTES, b"\x01x")) else b"x"
        assert unframe_download(b"".join(message)) == last
    assert len(unframe_download(new)) == len(unframe_upload(new)) == 0


def test_a_chunk_larger_than_the_protocol_has_is_refused() -> None:
    """However it is written."""
    data = bytes(MAX_CHUNK_BYTES + 1)
    for message in (frame_upload(data), frame_upload(data) + field(7, VARINT, b"\x01")):
        with pytest.raises(InvalidInput, match="at most 3145728 are allowed"):
            unframe_upload(message)

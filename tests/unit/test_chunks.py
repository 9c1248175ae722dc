"""Chunks in their hand-made frames: protobuf's own bytes, and nothing else is taken."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shared.chunks import (
    CHUNK_BYTES,
    DOWNLOAD_DATA_FIELD,
    MAX_CHUNK_BYTES,
    UPLOAD_DATA_FIELD,
    frame,
    holds_field,
    unframe,
)
from shared.errors import InvalidInput
from shared.pb import federation_pb2 as pb

# A varint holds 7 bits a byte, so the length's own size changes at 2^7, 2^14 and 2^21.
BORDERS = sorted(
    {1, CHUNK_BYTES, MAX_CHUNK_BYTES}
    | {2**power + step for power in (7, 14, 21) for step in (-2, -1, 0, 1)}
)


@pytest.mark.parametrize("size", BORDERS)
def test_a_frame_is_what_protobuf_would_write(size: int) -> None:
    """Both messages, at every border of the length's varint, byte for byte; and back again."""
    data = bytes(range(251)) * (size // 251) + b"\xff" * (size % 251)
    download = frame(data, field=DOWNLOAD_DATA_FIELD)
    upload = frame(memoryview(data), field=UPLOAD_DATA_FIELD)
    assert download == pb.DownloadBlobResponse(data=data).SerializeToString()
    assert upload == pb.UploadUpdateRequest(data=data).SerializeToString()
    assert unframe(download, field=DOWNLOAD_DATA_FIELD) == data
    assert unframe(upload, field=UPLOAD_DATA_FIELD) == data


def test_an_empty_chunk_is_read_as_protobuf_reads_it() -> None:
    """No data can be a missing field (download) or one of length 0 (upload's oneof)."""
    assert frame(b"", field=UPLOAD_DATA_FIELD) == (
        pb.UploadUpdateRequest(data=b"").SerializeToString()
    )
    assert pb.DownloadBlobResponse.FromString(frame(b"", field=DOWNLOAD_DATA_FIELD)).data == b""
    for message in (b"", frame(b"", field=DOWNLOAD_DATA_FIELD)):
        assert bytes(unframe(message, field=DOWNLOAD_DATA_FIELD)) == b""


def test_a_chunk_larger_than_the_protocol_has_is_refused() -> None:
    framed = frame(bytes(MAX_CHUNK_BYTES + 1), field=UPLOAD_DATA_FIELD)
    with pytest.raises(InvalidInput, match="3145728 are the most"):
        unframe(framed, field=UPLOAD_DATA_FIELD)


@given(data=st.binary(max_size=300), field=st.integers(1, 15))
def test_unframe_undoes_frame(data: bytes, field: int) -> None:
    """Whatever is framed comes out again, under its field number only."""
    framed = frame(data, field=field)
    assert holds_field(framed, field=field)
    assert unframe(framed, field=field) == data
    other = field % 15 + 1
    assert not holds_field(framed, field=other)
    with pytest.raises(InvalidInput, match=f"bytes field {other}"):
        unframe(framed, field=other)


@given(
    message=st.one_of(
        st.binary(max_size=40),
        st.builds(lambda rest: b"\x0a" + rest, st.binary(max_size=40)),
        st.builds(lambda data, cut: frame(data, field=1)[:cut], st.binary(), st.integers(0, 8)),
        st.builds(lambda data, more: frame(data, field=1) + more, st.binary(), st.binary()),
    )
)
def test_garbage_is_invalid_input_and_what_is_taken_protobuf_reads_alike(message: bytes) -> None:
    """Any bytes: refused by name, or protobuf finds the same data in them."""
    try:
        data = unframe(message, field=DOWNLOAD_DATA_FIELD)
    except InvalidInput:
        try:
            parsed = pb.DownloadBlobResponse.FromString(message)
        except DecodeError:
            return
        assert message != frame(parsed.data, field=DOWNLOAD_DATA_FIELD)
    else:
        assert pb.DownloadBlobResponse.FromString(message).data == data

"""Payloads cut into chunks, each in the frame of a protobuf message with one bytes field.

DownloadBlobResponse.data is field 1 and UploadUpdateRequest.data field 2 of their messages. The
bytes made here are those protobuf would make; making them by hand spares a copy on either end,
which was worth 30 % of the throughput, and lets one list of framed chunks serve every download.
"""

from shared.errors import InvalidInput

CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 3 << 20
DOWNLOAD_DATA_FIELD = 1
UPLOAD_DATA_FIELD = 2

_LENGTH_DELIMITED = 2


def frame(data: bytes | memoryview, *, field: int) -> bytes:
    """Return the wire bytes of a message whose bytes field number `field` holds `data`."""
    prefix = bytearray([field << 3 | _LENGTH_DELIMITED])
    length = len(data)
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return b"".join((prefix, data))


def holds_field(message: bytes, *, field: int) -> bool:
    """Whether `message` begins with the length-delimited field number `field`."""
    return message[:1] == bytes([field << 3 | _LENGTH_DELIMITED])


def unframe(message: bytes, *, field: int) -> memoryview:
    """Return the bytes that `frame` wrapped, without copying them.

    An empty message stands for empty data, as in protobuf.

    Raises:
        InvalidInput: the message is anything but that one field, or holds more than
            `MAX_CHUNK_BYTES`.
    """
    if not message:
        return memoryview(b"")
    length = shift = 0
    for position in range(1, min(len(message), 6)):
        length |= (message[position] & 0x7F) << shift
        shift += 7
        if message[position] < 0x80:
            break
    else:
        position = 0
    if not position or not holds_field(message, field=field):
        raise InvalidInput(f"a chunk must hold bytes field {field} and nothing else")
    if position + 1 + length != len(message):
        raise InvalidInput(
            f"a chunk of {len(message)} bytes claims {length} bytes of data after byte {position}"
        )
    if length > MAX_CHUNK_BYTES:
        raise InvalidInput(
            f"a chunk holds {length} bytes; {MAX_CHUNK_BYTES} are the most, cut the payload smaller"
        )
    return memoryview(message)[position + 1 :]

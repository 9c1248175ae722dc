"""What it costs to take a chunk's data out of its message, beside protobuf's own parser.

    python -m benchmarks.chunks

Every way reads the same UploadUpdateRequest messages of 1 MiB, by turns in the same process, and
passes the data to BLAKE3 as the server does. "hash only" is the floor: the data is there already.
"a field more" is the message of a newer client, which our parser leaves to protobuf.
"""

import os
import statistics
import time
from collections.abc import Callable

from blake3 import blake3

from fedrounds.wire.framing import CHUNK_BYTES, frame_upload, unframe_upload
from fedrounds.wire.pb import federation_pb2 as pb

NUM_CHUNKS = 64
NUM_TURNS = 15
NEW_FIELD = b"\x38\x01"
"""Field 7, a varint, which UploadUpdateRequest doesn't have."""

Way = Callable[[], None]


def median_s(ways: dict[str, Way]) -> dict[str, float]:
    """Return the median seconds that each way takes for all the chunks, measured by turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_TURNS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print the rate of each way, and its time as a multiple of protobuf's."""
    payloads = [os.urandom(CHUNK_BYTES) for _ in range(NUM_CHUNKS)]
    messages = [frame_upload(one) for one in payloads]
    newer = [one + NEW_FIELD for one in messages]

    def hash_all(read: Callable[[bytes], bytes | memoryview], chunks: list[bytes]) -> Way:
        def way() -> None:
            hasher = blake3()
            for one in chunks:
                hasher.update(read(one))

        return way

    def by_protobuf(message: bytes) -> bytes:
        return pb.UploadUpdateRequest.FromString(message).data

    taken = median_s(
        {
            "hash only": hash_all(memoryview, payloads),
            "unframe_upload": hash_all(unframe_upload, messages),
            "protobuf": hash_all(by_protobuf, messages),
            "unframe_upload, a field more": hash_all(unframe_upload, newer),
        }
    )
    for name, seconds in taken.items():
        rate = NUM_CHUNKS * CHUNK_BYTES / seconds / 1e9
        print(f"{name:30} {rate:6.2f} GB/s {seconds / taken['protobuf']:6.2f} x protobuf")


if __name__ == "__main__":
    main()

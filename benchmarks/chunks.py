"""What it costs to take a chunk's data out of its message, beside protobuf's own parser.

    python -m benchmarks.chunks [--write]

Every way reads the same UploadUpdateRequest messages of 1 MiB, by turns in the same process, and
passes the data to BLAKE3 as the server does. "hash only" is the floor: the data is there already.
"a field more" is the message of a newer client, which our parser leaves to protobuf. With --write
the table goes into docs/performance.md.
"""

import argparse
import os
import time
from collections.abc import Callable

from blake3 import blake3

from benchmarks.federation import machine_line, write_section
from fedrounds.wire.framing import CHUNK_BYTES, frame_upload, unframe_upload
from fedrounds.wire.pb import federation_pb2 as pb

NUM_CHUNKS = 64
NUM_TURNS = 15
NEW_FIELD = b"\x38\x01"
"""Field 7, a varint, which UploadUpdateRequest doesn't have."""

Way = Callable[[], None]


def fastest_s(ways: dict[str, Way]) -> dict[str, float]:
    """Return the fewest processor seconds that each way takes for all chunks, measured by turns.

    The fewest: what other processes cost, such as an emptied cache, only adds.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_TURNS):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    return {name: min(times) for name, times in taken.items()}


def main() -> None:
    """Print or write the rate of each way, and its time as a multiple of protobuf's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    arguments = parser.parse_args()
    payloads = [os.urandom(CHUNK_BYTES) for _ in range(NUM_CHUNKS)]
    messages = [frame_upload(payload) for payload in payloads]
    newer = [message + NEW_FIELD for message in messages]

    def hash_all(read: Callable[[bytes], bytes | memoryview], chunks: list[bytes]) -> Way:
        def way() -> None:
            hasher = blake3()
            for chunk in chunks:
                hasher.update(read(chunk))

        return way

    def by_protobuf(message: bytes) -> bytes:
        return pb.UploadUpdateRequest.FromString(message).data

    taken = fastest_s(
        {
            "hash only": hash_all(memoryview, payloads),
            "unframe_upload": hash_all(unframe_upload, messages),
            "protobuf": hash_all(by_protobuf, messages),
            "unframe_upload, a field more": hash_all(unframe_upload, newer),
        }
    )
    lines = [
        f"{machine_line()}; `python -m benchmarks.chunks`",
        "",
        "| how the data is read | GB per processor second | time / protobuf's time |",
        "| --- | --- | --- |",
    ]
    for name, seconds in taken.items():
        rate = NUM_CHUNKS * CHUNK_BYTES / seconds / 1e9
        lines.append(f"| {name} | {rate:.2f} | {seconds / taken['protobuf']:.2f} |")
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        write_section("chunks", text)


if __name__ == "__main__":
    main()

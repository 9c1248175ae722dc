"""The physical limit of a round: the same bytes over raw gRPC, written and fdatasync'd, no more.

One asyncio server, client processes as many as the round has; in a round each downloads the model's
bytes and uploads as many. No digest, no check, no database, no training.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from benchmarks.federation import processor_s
from fedrounds.wire.framing import CHUNK_BYTES

_SERVICE = "raw.Stream"


async def _serve(num_bytes: int, folder: Path) -> None:
    chunk = os.urandom(CHUNK_BYTES)
    whole, rest = divmod(num_bytes, CHUNK_BYTES)
    chunks = [chunk] * whole + ([chunk[:rest]] if rest else [])
    loop = asyncio.get_running_loop()

    async def get(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        for message in chunks:
            await context.write(message)

    async def put(messages: AsyncIterator[bytes], _: aio.ServicerContext[bytes, bytes]) -> bytes:
        descriptor, path = tempfile.mkstemp(dir=folder)
        offset = 0
        async for message in messages:
            await loop.run_in_executor(None, os.pwrite, descriptor, message, offset)
            offset += len(message)
        await loop.run_in_executor(None, os.fdatasync, descriptor)
        os.close(descriptor)
        Path(path).unlink()
        return b"stored"

    server = aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                _SERVICE,
                {
                    "Get": grpc.unary_stream_rpc_method_handler(get),
                    "Put": grpc.stream_unary_rpc_method_handler(put),
                },
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def _run_client(port: int, num_bytes: int) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    get: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{_SERVICE}/Get")
    put: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"/{_SERVICE}/Put")
    chunk = os.urandom(CHUNK_BYTES)
    for _ in sys.stdin:
        received = sum(len(message) for message in get(b""))
        assert received == num_bytes
        put(chunk[: min(CHUNK_BYTES, num_bytes - at)] for at in range(0, num_bytes, CHUNK_BYTES))
        print("done", flush=True)


@dataclass(frozen=True)
class RawRound:
    """The seconds one round took, and the processor seconds of all its processes."""

    round_s: float
    processor_s: float


class RawRounds:
    """Processes that stand ready to move a round's bytes."""

    def __init__(self, server: subprocess.Popen[str], clients: list[subprocess.Popen[str]]) -> None:
        self._server = server
        self._clients = clients

    def run_round(self) -> RawRound:
        """Move the bytes once."""
        used_before = self._processor_s()
        began = time.perf_counter()
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in self._clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "done\n"
        round_s = time.perf_counter() - began
        return RawRound(round_s, self._processor_s() - used_before)

    def _processor_s(self) -> float:
        return sum(processor_s(process.pid) for process in (self._server, *self._clients))


@contextmanager
def raw_rounds(num_clients: int, num_bytes: int) -> Iterator[RawRounds]:
    """Start the processes; they end with the block."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.raw_stream", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with tempfile.TemporaryDirectory(prefix="fed-raw-") as folder:
        server = start("server", str(num_bytes), folder)
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        clients = [start("client", port, str(num_bytes)) for _ in range(num_clients)]
        try:
            yield RawRounds(server, clients)
        finally:
            for process in (server, *clients):
                process.kill()
                process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(_serve(int(sys.argv[2]), Path(sys.argv[3])))
    else:
        _run_client(int(sys.argv[2]), int(sys.argv[3]))

"""Many clients download the same model at the same time."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from fedrounds.types import EntryKind
from fedrounds.wire.framing import unframe_download
from fedserver.api.downloads import Downloads
from fedserver.models.checkpoints import Checkpoints
from fedserver.runtime import Threads

P = ParamSpec("P")
R = TypeVar("R")


class CountingThreads(Threads):
    """Counts what goes to the disk threads."""

    num_calls = 0

    async def on_disk(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Count, then do it."""
        self.num_calls += 1
        return await super().on_disk(call, *args, **kwargs)


def test_a_chunk_is_read_once_for_all_who_ask_meanwhile(tmp_path: Path) -> None:
    """Also if the one who asked first hangs up."""
    checkpoints = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER})
    model = checkpoints.save_initial({"w": torch.arange(300_000.0)})  # two chunks
    threads = CountingThreads()

    async def download_all() -> list[bytes]:
        downloads = Downloads(checkpoints, threads, idle_s=60.0)
        downloads.publish(model.digest)

        async def download() -> bytes:
            received = bytearray()

            async def take(framed: bytes) -> None:
                received.extend(unframe_download(framed))

            await downloads.send(
                model.digest,
                offset=0,
                write=take,
                on_progress=lambda: None,
                on_waiting=lambda: None,
            )
            return bytes(received)

        first, *others = [asyncio.create_task(download()) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.gather(*others)

    received = asyncio.run(download_all())
    threads.close()
    assert received == [checkpoints.path(model.digest).read_bytes()] * 4
    assert threads.num_calls == 2

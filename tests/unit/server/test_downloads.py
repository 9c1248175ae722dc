"""Many clients download the same model at the same time."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch

from fedrounds.errors import NotFound, ServerUnreachable, StorageUnusable
from fedrounds.types import EntryKind
from fedrounds.wire.framing import unframe_download
from fedserver.models.checkpoints import Checkpoints
from fedserver.models.downloads import Downloads
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
    """Also if the client that asked first hangs up."""
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


def test_a_client_that_takes_nothing_gives_its_slot_to_others(tmp_path: Path) -> None:
    """After --stall-after; it asks for the rest again. Nothing is under way afterwards."""
    checkpoints = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER})
    model = checkpoints.save_initial({"w": torch.arange(10.0)})
    threads = Threads()

    async def download() -> None:
        downloads = Downloads(checkpoints, threads, idle_s=0.05)

        async def take_nothing(_: bytes) -> None:
            assert downloads.under_way() == {model.digest}
            await asyncio.Event().wait()

        with pytest.raises(ServerUnreachable, match=r"nothing was taken .* for 0\.05 s"):
            await downloads.send(
                model.digest,
                offset=0,
                write=take_nothing,
                on_progress=lambda: None,
                on_waiting=lambda: None,
            )
        assert downloads.under_way() == set()

    asyncio.run(download())
    threads.close()


def test_a_chunk_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    """A failure isn't kept for those who ask later."""
    checkpoints = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER})
    model = checkpoints.save_initial({"w": torch.arange(10.0)})
    path, threads = checkpoints.path(model.digest), Threads()
    received = bytearray()

    async def download() -> None:
        downloads = Downloads(checkpoints, threads, idle_s=60.0)
        downloads.publish(model.digest)

        async def take(framed: bytes) -> None:
            received.extend(unframe_download(framed))

        async def send() -> None:
            await downloads.send(
                model.digest,
                offset=0,
                write=take,
                on_progress=lambda: None,
                on_waiting=lose_once,
            )

        away = path.with_suffix(".away")

        def lose_once() -> None:
            # Called between the look at the file and the first read.
            if not away.exists():
                path.rename(away)

        with pytest.raises(FileNotFoundError):
            await send()
        with pytest.raises(StorageUnusable):
            await send()
        away.replace(path)
        path.with_suffix(".away").touch()
        await send()

    asyncio.run(download())
    threads.close()
    assert bytes(received) == path.read_bytes()


def test_a_model_in_force_that_somebody_removed_is_the_servers_failure(tmp_path: Path) -> None:
    """An older model that is gone is not: the client asks again what is wanted now."""
    checkpoints = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER})
    in_force = checkpoints.save_initial({"w": torch.arange(10.0)}).digest
    checkpoints.drop(in_force)
    threads = Threads()
    downloads = Downloads(checkpoints, threads, idle_s=1.0)
    downloads.publish(in_force, state_digest="state")

    async def take(_: bytes) -> None:
        raise AssertionError

    def download(digest: str) -> None:
        asyncio.run(
            downloads.send(
                digest,
                offset=0,
                write=take,
                on_progress=lambda: None,
                on_waiting=lambda: None,
            )
        )

    for digest in (in_force, "state"):
        with pytest.raises(StorageUnusable, match=f"{digest} .* is gone from {tmp_path}: put it"):
            download(digest)
    with pytest.raises(NotFound):
        download("older")
    threads.close()

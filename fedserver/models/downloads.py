"""The bytes of global models, and of control variates, on their way to clients.

The chunks of the model in force are framed once and shared by all downloads, whatever the cohort's
size; any other blob (an older model that a restarted client still asks for) is read as it is sent.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedrounds.errors import NotFound, ServerUnreachable, StorageUnusable, WrongOffset
from fedrounds.wire.framing import CHUNK_BYTES, frame_download
from fedserver.flow_control import Slots
from fedserver.models.checkpoints import Checkpoints
from fedserver.runtime import Threads

_MAX_CHUNKS_UNDER_WAY = 32


class Downloads:
    """Serves blobs by digest, in bounded memory; keeps the framed chunks of the model in force."""

    def __init__(self, checkpoints: Checkpoints, threads: Threads, *, idle_s: float) -> None:
        self._checkpoints = checkpoints
        self._threads = threads
        self._idle_s = idle_s
        # gRPC copies what it is given to write: without a bound, a chunk for every slow client.
        self._slots = Slots(_MAX_CHUNKS_UNDER_WAY)
        self._under_way: Counter[str] = Counter()
        self._in_force: set[str | None] = set()
        self._digest = ""
        self._chunks: dict[int, asyncio.Future[bytes]] = {}

    def publish(self, digest: str, *, state_digest: str | None = None) -> None:
        """Keep the chunks of this model from now on, once they have been asked for.

        `state_digest` is that of the server state beside it.
        """
        self._in_force = {digest, state_digest}
        if digest != self._digest:
            self._digest = digest
            self._chunks = {}

    def under_way(self) -> set[str]:
        """Return the digests of the blobs that somebody is downloading."""
        return set(+self._under_way)

    async def send(
        self,
        digest: str,
        *,
        offset: int,
        write: Callable[[bytes], Awaitable[None]],
        on_progress: Callable[[], None],
        on_waiting: Callable[[], None],
    ) -> None:
        """Write the framed chunks of a blob from byte `offset` on.

        `on_progress` is called for each chunk that has left, `on_waiting` while the client waits
        for the server, and once that is over.

        Raises:
            ServerUnreachable: the client took nothing for so long that others get its slot.
            NotFound: there is no such blob.
            StorageUnusable: it is the model in force or its server state, and its file is gone.
            WrongOffset: `offset` is beyond its end.
        """
        path = self._checkpoints.find(digest)
        if path is None and digest in self._in_force:
            folder = self._checkpoints.path(digest).parent
            raise StorageUnusable(
                f"file {digest} of the global model that clients train on is gone from {folder}: "
                "put it back, or stop the server and go on with a copy of the state-dir"
            )
        if path is None:
            raise NotFound(f"there is no blob {digest!r}; pull work to learn what is wanted now")
        size_bytes = path.stat().st_size
        if not 0 <= offset <= size_bytes:
            raise WrongOffset(f"blob {digest} has {size_bytes} bytes; byte {offset} isn't in it")

        self._under_way[digest] += 1
        try:
            while offset < size_bytes:
                end = min(offset - offset % CHUNK_BYTES + CHUNK_BYTES, size_bytes)
                async with self._slots.hold(every_s=self._idle_s / 4, while_waiting=on_waiting):
                    on_waiting()
                    framed = await self._framed(path, digest, offset, end)
                    try:
                        async with asyncio.timeout(self._idle_s):
                            await write(framed)
                    except TimeoutError:
                        raise ServerUnreachable(
                            f"nothing was taken of blob {digest} for {self._idle_s:g} s; ask for "
                            "the rest again"
                        ) from None
                on_progress()
                offset = end
        finally:
            self._under_way[digest] -= 1

    async def _framed(self, path: Path, digest: str, begin: int, end: int) -> bytes:
        """Return a framed chunk; a chunk of the model in force is read once, for all who ask."""
        if digest != self._digest or begin % CHUNK_BYTES:
            return await self._threads.on_disk(_read_framed, path, begin, end)
        chunks = self._chunks
        if begin not in chunks:
            chunks[begin] = asyncio.ensure_future(
                self._threads.on_disk(_read_framed, path, begin, end)
            )

            def drop_if_failed(read: asyncio.Future[bytes]) -> None:
                if read.cancelled() or read.exception() is not None:
                    chunks.pop(begin, None)

            chunks[begin].add_done_callback(drop_if_failed)
        # A client that hangs up doesn't take the chunk away from the others.
        return await asyncio.shield(chunks[begin])


def _read_framed(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        return frame_download(file.read(end - begin))

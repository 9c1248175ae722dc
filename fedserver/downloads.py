"""The global model's bytes on their way to clients.

The chunks of the model in force are framed once and shared by all downloads, whatever the cohort's
size; anything else (an older model that a restarted client still asks for) is read as it is sent.
"""

from collections.abc import AsyncIterator

from fedserver.checkpoints import Checkpoints
from fedserver.workers import Workers
from shared.chunks import CHUNK_BYTES, DOWNLOAD_DATA_FIELD, frame
from shared.errors import NotFound, WrongOffset


class Downloads:
    """Serves blobs by digest; keeps the framed chunks of one of them."""

    def __init__(self, checkpoints: Checkpoints, workers: Workers) -> None:
        self._checkpoints = checkpoints
        self._workers = workers
        self._digest = ""
        self._chunks: dict[int, bytes] = {}

    def publish(self, digest: str) -> None:
        """Keep the chunks of this model from now on, once they have been asked for."""
        if digest != self._digest:
            self._digest = digest
            self._chunks = {}

    async def chunks(self, digest: str, *, offset: int) -> AsyncIterator[bytes]:
        """Yield the framed chunks of a blob from byte `offset` on.

        Raises:
            NotFound: there is no such blob.
            WrongOffset: `offset` is beyond its end.
        """
        path = self._checkpoints.path(digest)
        if not path.is_file():
            raise NotFound(f"there is no blob {digest!r}; pull work to learn what is wanted now")
        size_bytes = path.stat().st_size
        if not 0 <= offset <= size_bytes:
            raise WrongOffset(f"blob {digest} has {size_bytes} bytes; byte {offset} isn't in it")

        def read(begin: int, end: int) -> bytes:
            with path.open("rb", buffering=0) as file:
                file.seek(begin)
                return frame(file.read(end - begin), field=DOWNLOAD_DATA_FIELD)

        while offset < size_bytes:
            end = min(offset - offset % CHUNK_BYTES + CHUNK_BYTES, size_bytes)
            framed = self._chunks.get(offset) if digest == self._digest else None
            if framed is None:
                framed = await self._workers.on_disk(read, offset, end)
                if digest == self._digest and offset % CHUNK_BYTES == 0:
                    self._chunks[offset] = framed
            yield framed
            offset = end

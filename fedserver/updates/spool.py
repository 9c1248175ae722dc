"""How an update is made durable, and the folder of the updates that no round has aggregated yet.

An update goes through these steps, always in this order (fedserver.api.uploads takes them):

1. *Committed.* `UpdateStream.append` writes each chunk to one file, named by order and digest. The
   file's length says how much has arrived: after a broken connection the client sends the rest.
2. *Examined.* All bytes are there: their digest is compared with the header's, then admission reads
   every tensor. A bad update ends in quarantine and never becomes durable here.
3. *Durable.* `Spool.make_durable` syncs the file, then its folder, without which the name of the
   file could be lost.
4. *Recorded.* The store's `record_arrival` inserts the update and moves its order to STORED in one
   transaction, which SQLite syncs before it returns (WAL, synchronous=FULL).
5. *Acknowledged.* The client gets the receipt STORED, and only then empties its outbox.

What a kill -9 or a loss of power leaves behind, after each step:

- 1 or 2: bytes that no row names. The order is still open; the client resumes at the file's length.
- 3: a durable file that no row names. The client, without a receipt, sends the update again: it has
  no byte left to send, and steps 4 and 5 follow.
- 4: everything. The client asks again and gets the receipt DUPLICATE, which empties its outbox too.

The other order would lose data: a row before the sync may name bytes that aren't there, and a
receipt before the row lets the client delete an update that the round doesn't know. At the start,
fedserver.rounds.resuming compares each recorded update with its file once more.

Only one stream writes a file at a time: the newest fences the older ones. Of the files that streams
leave unfinished an order keeps the newest, and none beside a durable file, so that a client can't
fill the disk.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from fedrounds.errors import InvalidInput, StreamFenced, WrongOffset
from fedrounds.files import (
    WRITE_BACK_BYTES,
    begin_write_back,
    naming_full_disk,
    sync_file,
    sync_folder,
)
from fedrounds.tensors.codec import digest_file


def update_path(folder: Path, order_id: str, digest: str) -> Path:
    """Return the path of an order's update with this digest in a folder of updates."""
    return folder / f"{order_id}.{digest}"


class UpdateStream:
    """The open file of an update that is being written; made by `Spool.open_stream`."""

    def __init__(self, path: Path, *, offset: int, is_whole: bool = False) -> None:
        self.path = path
        self.offset = offset
        self.is_whole = is_whole
        self._begun = offset
        # Hashed as it arrives, while the bytes are still in the processor's cache.
        self._hasher = blake3() if offset == 0 else None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._lock = threading.Lock()
        self._is_fenced = False

    def append(self, data: memoryview) -> None:
        """Write `data` behind what is committed.

        Raises:
            StreamFenced: a newer stream of the same update took over.
            InvalidInput: all of the update is there already.
            OutOfSpace: the disk is full; what is committed stays.
        """
        with self._lock, naming_full_disk(self.path.parent):
            self._examine_fence()
            if self.is_whole:
                raise InvalidInput(
                    f"{self.path.name} arrived whole, with {self.offset} bytes; nothing follows it"
                )
            while data:
                written = os.pwrite(self._descriptor, data, self.offset)
                if self._hasher is not None:
                    self._hasher.update(data[:written])
                self.offset += written
                data = data[written:]
            if self.offset - self._begun >= WRITE_BACK_BYTES:
                count = self.offset - self._begun
                begin_write_back(self._descriptor, offset=self._begun, count=count)
                self._begun = self.offset

    def digest(self) -> str:
        """Return the digest of all that is committed."""
        if self._hasher is None:
            return digest_file(self.path)
        digest: str = self._hasher.hexdigest()
        return digest

    def make_durable(self) -> None:
        """Return when the file and its name survive a loss of power.

        Raises:
            StreamFenced: a newer stream of the same update took over.
            OutOfSpace: the disk is full.
        """
        with self._lock, naming_full_disk(self.path.parent):
            self._examine_fence()
            # First the bytes, then the name: a name that survives never stands for missing bytes.
            # The folder must be synced too: after a loss of power a file without a name is lost.
            sync_file(self._descriptor)
            sync_folder(self.path.parent)

    def fence(self) -> None:
        """Return when this stream has written its last byte."""
        with self._lock:
            self._is_fenced = True

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            self._is_fenced = True
            os.close(self._descriptor)

    def _examine_fence(self) -> None:
        if self._is_fenced:
            raise StreamFenced(f"a newer upload of {self.path.name} took over; this one stops")


class Spool:
    """Owns the folder. Its methods block on the disk: call them from worker threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._streams: dict[Path, UpdateStream] = {}
        # The file that the newest stream of an order left unfinished. None once a file of the order
        # may be durable: files that later streams leave unfinished are deleted with their stream.
        self._unfinished: dict[str, Path] = {}
        self._durable: dict[str, set[Path]] = {}
        self._lock = threading.Lock()

    def path(self, order_id: str, digest: str) -> Path:
        """Return the path of the update of this order with this digest."""
        return update_path(self._folder, order_id, digest)

    def committed_bytes(self, order_id: str, digest: str) -> int:
        """Return the number of bytes of this payload that have arrived, over all its streams."""
        try:
            return self.path(order_id, digest).stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def open_stream(self, order_id: str, digest: str, *, offset: int) -> Iterator[UpdateStream]:
        """Open an update's file to write from `offset` on; an older stream of it is fenced.

        The file that an earlier stream of the order left unfinished, of another update, is deleted.

        Raises:
            WrongOffset: `offset` isn't what is committed.
            OutOfSpace: the disk is full.
        """
        path = self.path(order_id, digest)
        with self._lock:
            if older := self._streams.get(path):
                older.fence()
            committed = self.committed_bytes(order_id, digest)
            if offset != committed:
                raise WrongOffset(
                    f"order {order_id}: the upload begins at byte {offset}, "
                    f"but {committed} bytes are committed; go on from there"
                )
            with naming_full_disk(self._folder):
                # Somebody may have removed it; of the updates that were in it the round loop tells.
                self._folder.mkdir(parents=True, exist_ok=True)
                is_whole = committed > 0 and path in self._durable.get(order_id, ())
                stream = UpdateStream(path, offset=offset, is_whole=is_whole)
            self._streams[path] = stream
            self._leave_unfinished(order_id, stream)
        try:
            yield stream
        finally:
            stream.close()
            with self._lock:
                if self._streams.get(path) is stream:
                    del self._streams[path]
                    self._leave_unfinished(order_id, stream)

    def _leave_unfinished(self, order_id: str, stream: UpdateStream) -> None:
        """Keep this file as the order's unfinished file if it needs that; the lock is held."""
        if stream.is_whole:
            return
        path = stream.path
        if order_id in self._durable:
            if path not in self._streams and path not in self._durable[order_id]:
                path.unlink(missing_ok=True)
            return
        former = self._unfinished.get(order_id, path)
        if former != path and former not in self._streams:
            former.unlink(missing_ok=True)
        self._unfinished[order_id] = path

    def make_durable(self, stream: UpdateStream) -> None:
        """Make a stream's file durable (see `UpdateStream`); from then on no stream changes it."""
        # Marked before the sync, not after: a stream that opens meanwhile must not write on.
        with self._lock:
            if self._streams.get(stream.path) is stream:
                order_id = _order_of(stream.path)
                self._durable.setdefault(order_id, set()).add(stream.path)
                stream.is_whole = True
                former = self._unfinished.pop(order_id, stream.path)
                if former not in self._streams:
                    former.unlink(missing_ok=True)
        stream.make_durable()

    def discard(self, stream: UpdateStream) -> None:
        """Delete a stream's file, unless a newer stream has taken it over."""
        with self._lock:
            if self._streams.get(stream.path) is stream:
                stream.fence()
                stream.path.unlink()

    def hand_over(self, stream: UpdateStream, to: Path) -> int:
        """Move a stream's file elsewhere on the same disk; returns its size in bytes.

        Raises:
            StreamFenced: a newer stream has taken it over.
        """
        with self._lock:
            if self._streams.get(stream.path) is not stream:
                raise StreamFenced(
                    f"a newer upload of {stream.path.name} took over; this one stops"
                )
            stream.fence()
            stream.path.replace(to)
        return stream.offset

    def move_out(self, order_id: str, digest: str, to: Path) -> None:
        """Move an update's file elsewhere on the same disk, if it is there and nobody writes it."""
        path = self.path(order_id, digest)
        with self._lock:
            if path not in self._streams and path.exists():
                path.replace(to)

    def drop(self, order_id: str, digest: str) -> None:
        """Delete an update's file, if it is there."""
        self.path(order_id, digest).unlink(missing_ok=True)

    def drop_unfinished(self, *, but: Set[str]) -> None:
        """Delete the unfinished files of all orders but these; a file being written stays."""
        with self._lock:
            ended = self._unfinished.keys() - but
            unfinished = [self._unfinished.pop(order_id) for order_id in ended]
            for order_id in self._durable.keys() - but:
                del self._durable[order_id]
        for path in unfinished:
            self._drop_unless_written(path)

    def drop_all_but(self, kept: Mapping[str, str | None]) -> None:
        """Delete all files but those of these orders, and those that are being written.

        `kept` has the digest of each order's update; None keeps all that has arrived for it.
        """
        for path in list(self._folder.iterdir()):
            if kept.get(_order_of(path), "") not in (None, path.name.partition(".")[2]):
                self._drop_unless_written(path)

    def _drop_unless_written(self, path: Path) -> None:
        # The lock is taken for each file: a stream that opens waits for one deletion at most.
        with self._lock:
            if path not in self._streams:
                path.unlink(missing_ok=True)


def _order_of(path: Path) -> str:
    return path.name.partition(".")[0]

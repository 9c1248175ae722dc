"""Blobs by digest: a client doesn't download again what it holds."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from fedrounds.errors import CorruptPayload
from fedrounds.files import naming_full_disk
from fedrounds.tensors.codec import digest_file
from fedrounds.types import Section

_NUM_KEPT = 2
_READ_BYTES = 1 << 20


class BlobCache:
    """Owns the folder; keeps the newest blobs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def fetch(self, section: Section, download: Callable[[int], Iterator[memoryview]]) -> Path:
        """Return the path of a section's blob; download the bytes that are missing.

        `download(offset)` yields the bytes from `offset` to the end. If it fails, the bytes that
        have arrived stay for the next call.

        Raises:
            CorruptPayload: there are too many bytes, or they don't match the digest; they are
                deleted.
            OutOfSpace: the disk is full.
        """
        digest = section.digest
        path = self._folder / digest
        if path.exists():
            if digest_file(path) == digest:
                os.utime(path)  # its age counts from its last use
                return path
            path.unlink()  # after a power loss a file may be shorter than it was
        part = path.with_suffix(".part")
        with naming_full_disk(self._folder):
            # Hashed as it arrives, while the bytes are still in the processor's cache.
            hasher = blake3()
            with part.open("a+b") as file:
                file.seek(0)
                while earlier := file.read(_READ_BYTES):
                    hasher.update(earlier)
                size = file.tell()
                for data in download(size):
                    size += len(data)
                    # A server's stream may never end; it must not fill this disk.
                    if size > section.size_bytes:
                        break
                    hasher.update(data)
                    file.write(data)
            if size > section.size_bytes or hasher.hexdigest() != digest:
                part.unlink()
                raise CorruptPayload(
                    f"blob {digest} arrived with other bytes than its {section.size_bytes}; "
                    "fetching it again"
                )
            part.replace(path)
        self._forget_old(keep=path)
        return path

    def _forget_old(self, *, keep: Path) -> None:
        blobs = sorted(
            (path for path in self._folder.iterdir() if path != keep),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        for path in blobs[_NUM_KEPT - 1 :]:
            path.unlink()

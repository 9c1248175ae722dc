"""Blobs by digest: fetched once, resumed where it broke off, never used damaged."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedclient.cache import BlobCache
from fedrounds.errors import CorruptPayload, ServerUnreachable
from fedrounds.tensors.codec import digest_bytes
from fedrounds.types import Section

BLOB = bytes(range(256)) * 20
DIGEST = digest_bytes(BLOB)


def section_of(blob: bytes) -> Section:
    """Return what an order says of a blob."""
    return Section(name="model", digest=digest_bytes(blob), size_bytes=len(blob))


SECTION = section_of(BLOB)


class Server:
    """Serves one blob in pieces of 1,000 bytes and notes where each download begins."""

    def __init__(self, blob: bytes = BLOB, *, breaks_after: int | None = None) -> None:
        self.offsets: list[int] = []
        self._blob = blob
        self._breaks_after = breaks_after

    def __call__(self, offset: int) -> Iterator[memoryview]:
        """Yield the bytes from `offset` on, to the end or until it breaks."""
        self.offsets.append(offset)
        for number, begin in enumerate(range(offset, len(self._blob), 1000)):
            if number == self._breaks_after:
                raise ServerUnreachable("gone")
            yield memoryview(self._blob)[begin : begin + 1000]


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    """Give an empty cache."""
    return BlobCache(tmp_path / "blobs")


def refuse_to_serve(_: int) -> Iterator[memoryview]:
    """Stand for a server that must not be asked."""
    pytest.fail("the blob was asked for again")


def test_a_blob_is_fetched_once(cache: BlobCache, tmp_path: Path) -> None:
    """The second time nothing is asked for, by another process neither."""
    server = Server()
    path = cache.fetch(SECTION, server)
    assert path.read_bytes() == BLOB
    assert server.offsets == [0]
    assert cache.fetch(SECTION, refuse_to_serve) == path
    assert BlobCache(tmp_path / "blobs").fetch(SECTION, refuse_to_serve) == path


def test_a_download_goes_on_from_the_byte_where_it_broke(cache: BlobCache, tmp_path: Path) -> None:
    """What has arrived stays over a break, and over the client's restart."""
    with pytest.raises(ServerUnreachable):
        cache.fetch(SECTION, Server(breaks_after=2))
    again = Server(breaks_after=1)
    with pytest.raises(ServerUnreachable):
        cache.fetch(SECTION, again)
    last = Server()
    assert BlobCache(tmp_path / "blobs").fetch(SECTION, last).read_bytes() == BLOB
    assert (again.offsets, last.offsets) == ([2000], [3000])


@pytest.mark.parametrize("wrong", [b"", BLOB[:-1], BLOB + b"x", bytes(len(BLOB))])
def test_other_bytes_than_the_digests_are_dropped(cache: BlobCache, wrong: bytes) -> None:
    """CorruptPayload, nothing stays of them, and the next call begins at byte 0."""
    with pytest.raises(CorruptPayload, match=DIGEST):
        cache.fetch(SECTION, Server(wrong))
    server = Server()
    assert cache.fetch(SECTION, server).read_bytes() == BLOB
    assert server.offsets == [0]


def test_no_more_bytes_are_taken_than_the_section_has(cache: BlobCache, tmp_path: Path) -> None:
    """A stream without an end is left at the piece that goes beyond; nothing stays of it."""
    sizes: list[int] = []

    def endless(_: int) -> Iterator[memoryview]:
        while len(sizes) < 100:
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir()))
            yield memoryview(BLOB)

    with pytest.raises(CorruptPayload, match=f"other bytes than its {len(BLOB)}; fetching it"):
        cache.fetch(SECTION, endless)
    assert len(sizes) == 2
    assert max(sizes) <= len(BLOB)
    assert list((tmp_path / "blobs").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", BLOB[:-1], bytes(len(BLOB))])
def test_a_blob_damaged_on_the_disk_is_fetched_anew(cache: BlobCache, damage: bytes) -> None:
    """After a loss of power a file may hold less than its name says: it is not trained from."""
    cache.fetch(SECTION, Server()).write_bytes(damage)
    server = Server()
    assert cache.fetch(SECTION, server).read_bytes() == BLOB
    assert server.offsets == [0]


def test_the_cache_does_not_grow_with_the_rounds(cache: BlobCache, tmp_path: Path) -> None:
    """The newest two stay: the blob in use and the blob before."""
    blobs = [bytes([number]) * 100 for number in range(5)]
    paths = []
    for number, blob in enumerate(blobs):
        paths.append(cache.fetch(section_of(blob), _serving(blob)))
        os.utime(paths[-1], (number, number))
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {
        path.name for path in paths[-2:]
    }


def test_what_is_used_again_stays(cache: BlobCache, tmp_path: Path) -> None:
    """A blob's age counts from its last use, not from its download."""
    first, second, third = (bytes([number]) * 100 for number in range(3))
    for number, blob in enumerate((first, second)):
        os.utime(cache.fetch(section_of(blob), _serving(blob)), (number, number))
    cache.fetch(section_of(first), refuse_to_serve)
    cache.fetch(section_of(third), _serving(third))
    names = {path.name for path in (tmp_path / "blobs").iterdir()}
    assert names == {digest_bytes(first), digest_bytes(third)}


def _serving(blob: bytes) -> Callable[[int], Iterator[memoryview]]:
    return Server(blob)

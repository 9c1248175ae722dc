"""Updates on disk: what is committed is never lost, and only the newest stream writes."""

import errno
import os
from pathlib import Path

import pytest

from fedrounds.errors import InvalidInput, OutOfSpace, StreamFenced, WrongOffset
from fedrounds.tensors.codec import digest_bytes
from fedserver.updates.spool import Spool

ORDER, DIGEST = "run1-r1-a1-c0-s1", "ab" * 32
OTHER, THIRD = "cd" * 32, "ef" * 32


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Give an empty spool."""
    return Spool(tmp_path / "spool")


def test_an_upload_resumes_where_it_broke_off(spool: Spool) -> None:
    """Streams one after another, each from the committed byte on, join to the payload."""
    payload = bytes(range(256)) * 10
    for begin, end in [(0, 700), (700, 701), (701, 701), (701, len(payload))]:
        assert spool.committed_bytes(ORDER, DIGEST) == begin
        with spool.open_stream(ORDER, DIGEST, offset=begin) as stream:
            stream.append(memoryview(payload)[begin:end])
            assert stream.offset == end
    with spool.open_stream(ORDER, DIGEST, offset=len(payload)) as stream:
        stream.make_durable()
    assert spool.path(ORDER, DIGEST).read_bytes() == payload


def test_a_spool_opened_again_knows_what_is_committed(spool: Spool, tmp_path: Path) -> None:
    """After the server's restart the file's length is the offset to go on from."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"half"))
    again = Spool(tmp_path / "spool")
    assert again.committed_bytes(ORDER, DIGEST) == 4
    with again.open_stream(ORDER, DIGEST, offset=4) as stream:
        stream.append(memoryview(b"more"))
    assert again.path(ORDER, DIGEST).read_bytes() == b"halfmore"


@pytest.mark.parametrize("offset", [0, 3, 5, 2**62])
def test_a_wrong_offset_writes_nothing_and_says_the_right_one(spool: Spool, offset: int) -> None:
    """Neither a gap nor bytes written twice; the message says how much is committed."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"1234"))
    with (
        pytest.raises(WrongOffset, match=f"begins at byte {offset}, but 4 bytes are committed"),
        spool.open_stream(ORDER, DIGEST, offset=offset),
    ):
        pytest.fail("the stream was opened")
    assert spool.path(ORDER, DIGEST).read_bytes() == b"1234"


def test_a_newer_stream_fences_the_older(spool: Spool) -> None:
    """The older one writes no byte and makes nothing durable any more; the newer goes on."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as older:
        older.append(memoryview(b"12"))
        with spool.open_stream(ORDER, DIGEST, offset=2) as newer:
            with pytest.raises(StreamFenced, match="a newer upload"):
                older.append(memoryview(b"zombie"))
            with pytest.raises(StreamFenced, match="a newer upload"):
                older.make_durable()
            newer.append(memoryview(b"34"))
        with pytest.raises(StreamFenced):
            older.append(memoryview(b"zombie"))
    assert spool.path(ORDER, DIGEST).read_bytes() == b"1234"


def test_a_newer_stream_with_a_wrong_offset_still_stops_the_older(spool: Spool) -> None:
    """Its client has given the older stream up: what is committed must stand still from then on."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as older:
        older.append(memoryview(b"12"))
        with pytest.raises(WrongOffset), spool.open_stream(ORDER, DIGEST, offset=7):
            pytest.fail("the stream was opened")
        with pytest.raises(StreamFenced):
            older.append(memoryview(b"34"))
    assert spool.committed_bytes(ORDER, DIGEST) == 2


def test_a_closed_stream_writes_nothing(spool: Spool) -> None:
    """A worker that comes late finds the stream fenced, not another file's descriptor."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        pass
    with pytest.raises(StreamFenced):
        stream.append(memoryview(b"late"))
    assert spool.committed_bytes(ORDER, DIGEST) == 0


def test_streams_of_other_updates_are_left_alone(spool: Spool) -> None:
    """Fencing is by order and digest: two contents of one order are two files."""
    with (
        spool.open_stream(ORDER, DIGEST, offset=0) as first,
        spool.open_stream(ORDER, OTHER, offset=0) as second,
        spool.open_stream("another", DIGEST, offset=0) as third,
    ):
        for stream, content in ((first, b"1"), (second, b"22"), (third, b"333")):
            stream.append(memoryview(content))
        assert spool.committed_bytes(ORDER, DIGEST) == 1
        assert spool.committed_bytes(ORDER, OTHER) == 2
    assert spool.committed_bytes("another", DIGEST) == 3


def test_a_full_disk_keeps_what_is_committed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """OutOfSpace names the folder; once there is room the upload goes on from its offset."""
    write = os.pwrite

    def write_three_then_fail(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: 3 - offset], offset)

    monkeypatch.setattr(os, "pwrite", write_three_then_fail)
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        with pytest.raises(OutOfSpace, match="no room to write in"):
            stream.append(memoryview(b"123456"))
        assert stream.offset == 3
    monkeypatch.undo()
    assert spool.committed_bytes(ORDER, DIGEST) == 3
    with spool.open_stream(ORDER, DIGEST, offset=3) as stream:
        stream.append(memoryview(b"456"))
    assert spool.path(ORDER, DIGEST).read_bytes() == b"123456"


def test_a_folder_that_was_removed_is_made_again(spool: Spool) -> None:
    """An upload needs nothing of what was in it."""
    spool.path(ORDER, DIGEST).parent.rmdir()
    assert spool.committed_bytes(ORDER, DIGEST) == 0
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"123"))
        stream.make_durable()
    assert spool.path(ORDER, DIGEST).read_bytes() == b"123"


def test_what_no_round_needs_is_deleted(spool: Spool) -> None:
    """Dropping one, dropping it again, and dropping all orders but those named."""
    for order in ("a", "b", "c"):
        with spool.open_stream(order, DIGEST, offset=0) as stream:
            stream.append(memoryview(b"x"))
    spool.drop("a", DIGEST)
    spool.drop("a", DIGEST)
    assert [spool.committed_bytes(order, DIGEST) for order in "abc"] == [0, 1, 1]
    with spool.open_stream("d", DIGEST, offset=0) as stream:
        stream.append(memoryview(b"x"))
        spool.drop_all_but({"b": OTHER, "c": None})
    assert [spool.committed_bytes(order, DIGEST) for order in "abcd"] == [0, 0, 1, 1]
    spool.drop_all_but({"c": DIGEST})
    assert [spool.committed_bytes(order, DIGEST) for order in "abcd"] == [0, 0, 1, 0]


def sizes(spool: Spool, *digests: str) -> list[int]:
    """Return how much of each of these updates of ORDER is there."""
    return [spool.committed_bytes(ORDER, digest) for digest in digests]


def test_an_order_keeps_the_newest_of_what_was_left_unfinished(spool: Spool) -> None:
    """A client that begins ever new updates fills no disk, one after another or several at once."""
    for digest in (DIGEST, OTHER, THIRD):
        with spool.open_stream(ORDER, digest, offset=0) as stream:
            stream.append(memoryview(b"12"))
    assert sizes(spool, DIGEST, OTHER, THIRD) == [0, 0, 2]
    with (
        spool.open_stream(ORDER, DIGEST, offset=0) as first,
        spool.open_stream(ORDER, OTHER, offset=0) as second,
    ):
        assert sizes(spool, THIRD) == [0]
        first.append(memoryview(b"1"))
        second.append(memoryview(b"22"))
        assert sizes(spool, DIGEST, OTHER) == [1, 2], "nothing goes that is being written"
    assert sizes(spool, DIGEST, OTHER) == [1, 0]
    spool.drop_unfinished(but={ORDER})
    assert sizes(spool, DIGEST) == [1]
    spool.drop_unfinished(but={"another"})
    assert sizes(spool, DIGEST) == [0]


def test_what_is_durable_is_not_in_the_way_of_another_update(spool: Spool) -> None:
    """Neither by a new stream, nor by a stream that took over and broke off, nor as unfinished."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"12"))
        spool.make_durable(stream)
        with spool.open_stream(ORDER, DIGEST, offset=2):
            pass
        with spool.open_stream(ORDER, OTHER, offset=0):
            pass
    with spool.open_stream(ORDER, DIGEST, offset=2):
        pass
    with spool.open_stream(ORDER, OTHER, offset=0):
        pass
    spool.drop_unfinished(but=set())
    assert sizes(spool, DIGEST) == [2]


def test_nothing_unfinished_stays_beside_what_is_durable(spool: Spool) -> None:
    """Whether it was left before or is being left after; what is written goes when it closes."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"12"))
        with spool.open_stream(ORDER, OTHER, offset=0) as left_before:
            left_before.append(memoryview(b"1"))
        with spool.open_stream(ORDER, THIRD, offset=0) as left_after:
            left_after.append(memoryview(b"1"))
            with spool.open_stream(ORDER, OTHER, offset=0) as left_before:
                left_before.append(memoryview(b"1"))
            spool.make_durable(stream)
            assert sizes(spool, DIGEST, OTHER, THIRD) == [2, 0, 1]
    assert sizes(spool, DIGEST, OTHER, THIRD) == [2, 0, 0]


def test_nothing_is_added_to_what_is_durable(spool: Spool) -> None:
    """A second stream that says it has more can't spoil what may be recorded by now."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"12"))
        spool.make_durable(stream)
        with (
            spool.open_stream(ORDER, DIGEST, offset=2) as second,
            pytest.raises(InvalidInput, match="arrived whole, with 2 bytes"),
        ):
            second.append(memoryview(b"3"))
    assert sizes(spool, DIGEST) == [2]


def test_what_is_durable_stays_when_its_order_ends_before_its_stream(spool: Spool) -> None:
    """It may be counted by then: a stream that closes late leaves nothing unfinished behind."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"12"))
        spool.make_durable(stream)
        spool.drop_unfinished(but=set())
    spool.drop_unfinished(but=set())
    assert sizes(spool, DIGEST) == [2]


def test_what_was_durable_and_is_gone_may_be_sent_again(spool: Spool) -> None:
    """A second stream found that the disk holds other bytes by now."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        stream.append(memoryview(b"12"))
        spool.make_durable(stream)
    with spool.open_stream(ORDER, DIGEST, offset=2) as second:
        spool.discard(second)
    with spool.open_stream(ORDER, DIGEST, offset=0) as again:
        again.append(memoryview(b"12"))
    assert sizes(spool, DIGEST) == [2]


def test_discarding_spares_the_file_of_a_newer_stream(spool: Spool) -> None:
    """What an older stream sent was corrupt; the newer stream that took the file over goes on."""
    with spool.open_stream("a", DIGEST, offset=0) as older:
        older.append(memoryview(b"bad"))
        with spool.open_stream("a", DIGEST, offset=3) as newer:
            spool.discard(older)
            newer.append(memoryview(b"er"))
            assert spool.committed_bytes("a", DIGEST) == 5
            spool.discard(newer)
            assert spool.committed_bytes("a", DIGEST) == 0


def test_what_is_being_written_isnt_moved(tmp_path: Path, spool: Spool) -> None:
    """A file that a stream holds stays where the stream expects it; afterwards it moves."""
    target = tmp_path / "elsewhere"
    with spool.open_stream("order", "digest", offset=0) as stream:
        stream.append(memoryview(b"abc"))
        spool.move_out("order", "digest", target)
        assert not target.exists()
    spool.move_out("order", "digest", target)
    spool.move_out("order", "digest", target)
    assert target.read_bytes() == b"abc"
    assert spool.committed_bytes("order", "digest") == 0


def test_a_payload_is_handed_over_by_its_newest_stream_alone(tmp_path: Path, spool: Spool) -> None:
    """The newest stream's bytes move and it writes no more; an older stream is fenced."""
    target = tmp_path / "elsewhere"
    with spool.open_stream(ORDER, DIGEST, offset=0) as older:
        older.append(memoryview(b"abc"))
        with spool.open_stream(ORDER, DIGEST, offset=3) as newer:
            with pytest.raises(StreamFenced, match="took over"):
                spool.hand_over(older, target)
            assert not target.exists()
            newer.append(memoryview(b"de"))
            assert spool.hand_over(newer, target) == 5
            with pytest.raises(StreamFenced):
                newer.append(memoryview(b"f"))
    assert target.read_bytes() == b"abcde"
    assert spool.committed_bytes(ORDER, DIGEST) == 0


def test_a_resumed_stream_has_the_digest_of_all_bytes(spool: Spool) -> None:
    """The bytes of the stream before it went through another hash: they are read again."""
    for begin, part in ((0, b"pay"), (3, b"load")):
        with spool.open_stream(ORDER, DIGEST, offset=begin) as stream:
            stream.append(memoryview(part))
            digest = stream.digest()
    assert digest == digest_bytes(b"payload")


def test_an_older_stream_makes_nothing_durable(spool: Spool) -> None:
    """Its file belongs to the newer stream, which may write on."""
    with spool.open_stream(ORDER, DIGEST, offset=0) as older:
        older.append(memoryview(b"abc"))
        with spool.open_stream(ORDER, DIGEST, offset=3) as newer:
            with pytest.raises(StreamFenced):
                spool.make_durable(older)
            newer.append(memoryview(b"de"))
    assert spool.path(ORDER, DIGEST).read_bytes() == b"abcde"


def test_a_large_payload_is_written_back_while_it_arrives(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that so many bytes are new, so that the last sync has little left to write."""
    begun: list[tuple[int, int]] = []

    def note(_: int, *, offset: int, count: int) -> None:
        begun.append((offset, count))

    monkeypatch.setattr("fedserver.updates.spool.begin_write_back", note)
    monkeypatch.setattr("fedserver.updates.spool.WRITE_BACK_BYTES", 4)
    with spool.open_stream(ORDER, DIGEST, offset=0) as stream:
        for part in (b"abc", b"de", b"f", b"ghij"):
            stream.append(memoryview(part))
    assert begun == [(0, 5), (5, 5)]

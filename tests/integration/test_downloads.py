"""DownloadBlob: the global model's bytes, from any byte on."""

import grpc
import pytest

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.federation import BIG
from tests.integration.peer import OpenRound, Peer, expect_status, open_round
from tests.processes import GENEROUS_S, Scene, wait_until


def test_a_blob_is_what_its_digest_says(opened: OpenRound) -> None:
    """The model an order starts from arrives with the size and the digest the order names."""
    section = opened.orders[0].sections[0]
    blob = opened.peers[0].download(section.digest)
    assert len(blob) == section.size_bytes
    assert digest_bytes(blob) == section.digest


@pytest.mark.parametrize("offset", [1, 1000, -1])
def test_a_download_goes_on_from_any_byte(opened: OpenRound, offset: int) -> None:
    """After a broken stream only the rest is sent; at the very end there is no rest."""
    peer, section = opened.peers[0], opened.orders[0].sections[0]
    blob = peer.download(section.digest)
    assert peer.download(section.digest, offset=offset % len(blob)) == blob[offset:]
    assert peer.download(section.digest, offset=len(blob)) == b""


@pytest.mark.parametrize("beyond", [1, 2**63])
def test_an_offset_beyond_the_end_is_out_of_range(opened: OpenRound, beyond: int) -> None:
    """A client whose partial file is longer than the blob learns that it must start over."""
    section = opened.orders[0].sections[0]
    expect_status(
        grpc.StatusCode.OUT_OF_RANGE,
        lambda: opened.peers[0].download(section.digest, offset=section.size_bytes + beyond),
    )


def test_an_unknown_digest_is_not_found(opened: OpenRound) -> None:
    """A blob that isn't there (any more) sends the client to pull again."""
    details = expect_status(grpc.StatusCode.NOT_FOUND, lambda: opened.peers[0].download("0" * 64))
    assert "pull work" in details


@pytest.mark.parametrize("digest", ["", "../federation", "A" * 64, "0" * 65, "0" * 63 + "/"])
def test_what_is_no_digest_never_becomes_a_path(opened: OpenRound, digest: str) -> None:
    """Nothing but 64 lower-case hexadecimal digits is looked for on the disk."""
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: opened.peers[0].download(digest),
        match="isn't a digest",
    )


def test_a_download_of_which_nothing_is_taken_ends_with_a_sentence(scene: Scene) -> None:
    """Its slot is given to others, with a status: it doesn't wait for the rest for ever."""
    flags = ("--stall-after", 1, "--first-step", 1)
    server = scene.server("--task", BIG, "--rounds", 9, "--min-clients", 1, *flags)
    peer, idle = Peer(server.address, 0), Peer(server.address, 0, num_examples=0)
    order = open_round({0: peer}).orders[0]
    # A chunk is larger than the window of a stream that nobody reads from.
    request = pb.DownloadBlobRequest(session_id=peer.session_id, digest=order.sections[0].digest)
    untaken = idle.stub.DownloadBlob(request, timeout=GENEROUS_S)
    # The two clocks are of the same length, and the download's begins first.
    wait_until(
        lambda: peer.report(order) == pb.DIRECTIVE_ABANDON,
        what="the client that takes nothing to be given up",
        every_s=0.05,
    )
    details = expect_status(grpc.StatusCode.UNAVAILABLE, lambda: list(untaken))
    assert "nothing was taken" in details
    peer.close()
    idle.close()

"""Promise 5: the server's memory grows with the model, not with the number of clients."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.framing import CHUNK_BYTES
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import Peer, changed, is_finite, open_round, payload_of
from tests.processes import Scene

NUM_CLIENTS = 60
MIB = 1 << 20
SLACK_BYTES = 64 * MIB


def test_sixty_slow_uploads_at_once_take_three_models_of_memory_at_most(scene: Scene) -> None:
    """Peak RSS stays within idle + 3 models + 64 MiB through downloads, uploads and the mean."""
    crowded = scene.server(
        *("--task", "tests.tiny_task:big", "--rounds", 2, "--min-clients", NUM_CLIENTS),
        *("--stall-after", 600, "--lease", 600, "--farewell", 0),
        FED_COLD_START="1",
    )
    crowded.wait_for_line("waiting for clients")
    idle_bytes = crowded.rss_bytes()
    peers = {client_id: Peer(crowded.address, client_id) for client_id in range(NUM_CLIENTS)}
    first, *others = peers.values()
    order = first.pull_order()
    blob = first.download(order.sections[0].digest)
    model_bytes = len(blob)
    assert first.download(order.sections[0].digest, offset=MIB + 1) == blob[MIB + 1 :]
    payload = payload_of(changed(first.base_of(order)))
    digest = digest_bytes(payload)

    def slowly(peer: Peer, mine: pb.WorkOrder) -> Iterator[pb.UploadUpdateRequest]:
        yield peer.header(mine, payload, digest=digest)
        for begin in range(0, len(payload), CHUNK_BYTES):
            # Slow is the point here: all sixty are to be under way at the same time.
            time.sleep(0.02 * CHUNK_BYTES / MIB)
            yield pb.UploadUpdateRequest(data=payload[begin : begin + CHUNK_BYTES])

    def deliver(peer: Peer) -> int:
        mine = peer.pull_order()
        num_bytes = 0
        for part in peer.download_parts(mine.sections[0].digest):
            num_bytes += len(part)
        assert num_bytes == model_bytes
        return peer.stub.UploadUpdate(slowly(peer, mine)).receipt

    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        receipts = list(threads.map(deliver, itertools.chain([first], others)))
    assert receipts == [pb.RECEIPT_STORED] * NUM_CLIENTS
    second = open_round({0: first})
    assert second.orders[0].round == 2
    assert is_finite(second.base)
    crowded.wait_for_line("evaluated round=1")

    peak_bytes = crowded.peak_rss_bytes()
    allowed_bytes = idle_bytes + 3 * model_bytes + SLACK_BYTES
    figures = (
        f"idle {idle_bytes / MIB:.0f} MiB, model {model_bytes / MIB:.1f} MiB, "
        f"peak {peak_bytes / MIB:.0f} MiB, allowed {allowed_bytes / MIB:.0f} MiB"
    )
    print(figures)
    assert peak_bytes <= allowed_bytes, figures

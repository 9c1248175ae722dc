"""Compression over the wire: who is asked for it, what is taken, what the history says of it."""

import pytest
import torch

from fedclient.update_encoding import encode_update
from fedrounds.tensors.codec import decode_state, encode_state
from fedrounds.tensors.entries import entry_kinds
from fedrounds.types import Compression, Encoding
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import OpenRound, Peer, changed, open_round, payload_of
from tests.processes import Scene
from tests.tiny_task import tiny

INT8 = Compression(encoding=Encoding.INT8, block_size=8)
CAPABLE, INCAPABLE, WRONG = 0, 1, 2


def test_a_run_takes_compressed_and_whole_updates(scene: Scene) -> None:
    """Who can is asked to compress; who can't sends all; what wasn't asked for is refused."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, "--min-clients", 3, "--min-updates", 2),
        *("--compression", "int8", "--compression-block", INT8.block_size),
        *("--farewell", 0, "--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peers = {
        client_id: Peer(server.address, client_id) for client_id in (CAPABLE, INCAPABLE, WRONG)
    }
    for client_id, capabilities in {INCAPABLE: ["float16"], CAPABLE: ["int8", "telepathy"]}.items():
        answer = peers[client_id].register(capabilities=capabilities, num_examples=[10])
        assert answer.HasField("compression") is (client_id == CAPABLE)
    wanted = pb.Compression(encoding=pb.ENCODING_INT8, block_size=8, fraction=0.05)
    assert answer.compression == wanted
    opened = open_round(peers)
    compressed, received = _compressed(scene, opened)
    whole = changed(opened.base, by=0.25)
    refused = peers[WRONG].upload(
        opened.orders[WRONG], compressed, encoding=pb.ENCODING_TOP_K, num_examples=30
    )
    assert refused.receipt == pb.RECEIPT_REFUSED
    assert "encoding is top-k; this run takes int8 or state-dict" in refused.reason
    stored = peers[CAPABLE].upload(
        opened.orders[CAPABLE],
        compressed,
        encoding=pb.ENCODING_INT8,
        num_examples=30,
        metrics={"loss": 0.5, "accuracy": 0.75, "compression_error": 0.125},
    )
    assert stored.receipt == pb.RECEIPT_STORED, stored.reason
    stored = peers[INCAPABLE].upload(opened.orders[INCAPABLE], payload_of(whole), num_examples=10)
    assert stored.receipt == pb.RECEIPT_STORED, stored.reason
    following = open_round({client_id: peers[client_id] for client_id in (CAPABLE, INCAPABLE)})
    for name, values in following.base.items():
        if values.is_floating_point():
            mean = (30 * received[name].double() + 10 * whole[name].double()) / 40
            torch.testing.assert_close(values, mean.float(), rtol=0, atol=1e-6)
    first, _ = scene.history()
    size = len(payload_of(opened.base))
    assert first["compression"] == {
        "ratio": pytest.approx((len(compressed) + size) / (2 * size)),
        "error": 0.125,
    }
    encodings = {
        update["client"]: (update["encoding"], update["verdict"]) for update in first["updates"]
    }
    assert encodings == {
        CAPABLE: ("int8", "COUNTED"),
        INCAPABLE: ("state-dict", "COUNTED"),
        WRONG: ("top-k", "REFUSED"),
    }
    for peer in peers.values():
        peer.close()


def _compressed(scene: Scene, opened: OpenRound) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a compressed update and the state_dict that is read from it, by plain arithmetic."""
    base = scene.folder / "base"
    base.write_bytes(payload_of(opened.base))
    trained = changed(opened.base)
    noise = torch.Generator().manual_seed(1)
    for name, tensor in trained.items():
        if tensor.is_floating_point():
            trained[name] = tensor + 0.1 * torch.rand(tensor.shape, generator=noise)
    parameters = {name for name in trained if "running" not in name and "num_" not in name}
    encoded = encode_update(
        trained,
        global_model=base,
        kinds=entry_kinds(tiny.build_model()),
        compression=INT8,
        seed=1,
        residual={},
    ).tensors
    payload = encode_state(encoded)
    sent = decode_state(payload)
    for name in parameters:
        values, scales = sent[f"delta/{name}"], sent[f"scales/{name}"]
        every = scales.repeat_interleave(INT8.block_size)[: values.numel()].view(values.shape)
        trained[name] = opened.base[name] + every * values
    return payload, trained

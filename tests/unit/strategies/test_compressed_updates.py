"""Compressed updates, from the client's payload to the next model: values, refusals, residuals."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedclient.state import ClientStates
from fedclient.update_encoding import RESIDUAL, encode_update
from fedrounds.errors import InvalidInput
from fedrounds.strategies import StrategySettings
from fedrounds.strategies.blocks import Block, BlockReader, Cohort, StateFile, blocks_of
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import decode_state, encode_state
from fedrounds.tensors.compression import CHUNK_ELEMENTS
from fedrounds.types import MODEL_SECTION, NO_COMPRESSION, Compression, Encoding, EntryKind
from fedserver.updates.admission import validate_content
from fedserver.updates.payload import update_file
from tests.factories import State, make_limits, write_state
from tests.small_federation import Sent, SmallFederation

COMPRESSIONS = [
    Compression(encoding=Encoding.FLOAT16),
    Compression(encoding=Encoding.BFLOAT16),
    Compression(encoding=Encoding.INT8, block_size=48),
    Compression(encoding=Encoding.TOP_K, fraction=0.1),
]
BY_ENCODING = pytest.mark.parametrize(
    "compression", COMPRESSIONS, ids=lambda compression: compression.encoding
)

# The second parameter begins within a chunk of coordinates and ends in another chunk.
SHAPES: dict[str, tuple[int, ...]] = {"a": (100, 7), "m": (3, CHUNK_ELEMENTS // 2), "z": ()}
KINDS = dict.fromkeys(SHAPES, EntryKind.PARAMETER) | {
    "running_var": EntryKind.MEAN,
    "num_batches_tracked": EntryKind.MAX,
}


def a_state(seed: int) -> dict[str, Tensor]:
    """Return a state_dict with parameters, a buffer and a counter."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state["running_var"] = torch.rand(5, generator=generator)
    state["num_batches_tracked"] = torch.tensor(seed)
    return state


class Received:
    """A client's compressed update as the server has it on its disk, beside its base."""

    def __init__(self, folder: Path, compression: Compression, *, seed: int = 1) -> None:
        self.compression = compression
        self.base = write_state(folder, a_state(0))
        self.trained = a_state(seed)
        self.path = folder / f"update-{seed}"
        encoded = encode_update(
            self.trained,
            global_model=self.base.path,
            kinds=KINDS,
            compression=compression,
            seed=seed,
            residual={},
        )
        self.error = encoded.metrics["compression_error"]
        self.path.write_bytes(encode_state(encoded.tensors))

    def open(self) -> StateFile:
        """Return it as it is read."""
        return update_file(
            self.path,
            base=self.base,
            kinds=KINDS,
            compression=self.compression,
            sections=[(MODEL_SECTION, self.path.stat().st_size)],
            num_examples=3,
            num_steps=2,
        )

    def examine(self) -> float:
        """Admit it or not."""
        return validate_content(
            self.open(),
            base=self.base,
            kinds=KINDS,
            limits=make_limits(max_delta_norm=1000.0),
        )

    def expected(self) -> dict[str, Tensor]:
        """Return the state_dict that was sent, from the payload by plain loops and NumPy."""
        compressed = {
            name: tensor.numpy()
            for name, tensor in self._payload().items()
            if tensor.dtype is not torch.bfloat16
        }
        base = decode_state(self.base.path.read_bytes())
        delta = {name: self._delta(name, compressed) for name in SHAPES}
        restored = {
            n: base[n] + torch.from_numpy(values).view(SHAPES[n]) for n, values in delta.items()
        }
        return restored | {n: self.trained[n] for n in KINDS if n not in SHAPES}

    def _payload(self) -> dict[str, Tensor]:
        return decode_state(self.path.read_bytes())

    def _delta(self, name: str, compressed: dict[str, Any]) -> Any:  # noqa: ANN401
        size = math.prod(SHAPES[name])
        if self.compression.encoding is Encoding.INT8:
            values = compressed[f"delta/{name}"].reshape(-1)
            scales = compressed[f"scales/{name}"]
            restored = [scales[i // 48] * np.float32(values[i]) for i in range(size)]
            return np.array(restored, dtype=np.float32)
        if self.compression.encoding is Encoding.TOP_K:
            vector = np.zeros(sum(math.prod(shape) for shape in SHAPES.values()), dtype=np.float32)
            at = 0
            for chunk, count in enumerate(compressed["counts"]):
                for low, high in compressed["offsets"][at : at + count]:
                    vector[chunk * 65536 + int(low) + 256 * int(high)] = compressed["values"][at]
                    at += 1
            begin = {"a": 0, "m": 700, "z": 700 + 3 * CHUNK_ELEMENTS // 2}[name]
            return vector[begin : begin + size]
        return self._payload()[f"delta/{name}"].float().reshape(-1).numpy()


def read_whole(file: StateFile, *, step: int) -> dict[str, Tensor]:
    """Return an update read in blocks of `step` elements."""
    reader = BlockReader()
    parts: dict[str, list[Tensor]] = {name: [] for name in file.layout.entries}
    for block in blocks_of(file.layout, max_elements=step):
        parts[block.name].append(reader.read(file, block).clone())
    return {n: torch.cat(parts[n]).view(entry.shape) for n, entry in file.layout.entries.items()}


@BY_ENCODING
def test_any_block_of_a_compressed_update_is_what_was_sent(
    tmp_path: Path, compression: Compression
) -> None:
    """Global plus delta, bit for bit as plain loops read the payload, for blocks of any length."""
    received = Received(tmp_path, compression)
    expected = received.expected()
    for step in (999, 65_536):
        read = read_whole(received.open(), step=step)
        assert read.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())
    reader, file = BlockReader(), received.open()
    last = reader.read(file, Block("m", 3 * CHUNK_ELEMENTS // 2 - 2, 2))
    assert torch.equal(last, expected["m"].view(-1)[-2:])
    norm = math.sqrt(
        sum(float((expected[n] - a_state(0)[n]).double().square().sum()) for n in SHAPES)
    )
    assert received.examine() == pytest.approx(norm, rel=1e-4)


@BY_ENCODING
@pytest.mark.parametrize("strategy", ["fedavg", "median", "krum", "nnm+geometric-median+fedadam"])
def test_every_rule_works_on_compressed_updates(
    tmp_path: Path, compression: Compression, strategy: str
) -> None:
    """The next model is that of whole updates that hold what was sent, bit for bit."""
    sent = [Received(tmp_path, compression, seed=seed) for seed in range(1, 6)]
    opened = [received.open() for received in sent]
    plain = [
        replace(write_state(tmp_path, read_whole(file, step=4096)), num_examples=3, num_steps=2)
        for file in opened
    ]
    rule = find_strategy(strategy, settings=StrategySettings(lr=0.1))
    models = [
        list(next_blocks(rule, Cohort(base=sent[0].base, updates=updates, kinds=KINDS)))
        for updates in (opened, plain)
    ]
    assert all(
        torch.equal(first.values, second.values) for first, second in zip(*models, strict=True)
    )


def test_bytes_and_error_are_what_they_promise(tmp_path: Path) -> None:
    """Half, a quarter and a scale per 48, and 6 bytes for one of ten coordinates of 4 bytes.

    What is lost is at most half a unit of 11 or 8 bits; under INT8 about 0.01, for normal values
    whose largest of 48 is about 2.4: 2.4 / 127 / sqrt(6); the top tenth holds 0.44 of the squares.
    """
    bounds = {
        Encoding.FLOAT16: (0.5, 2.0**-13, 2.0**-11),
        Encoding.BFLOAT16: (0.5, 2.0**-10, 2.0**-8),
        Encoding.INT8: (0.25 + 1 / 48, 0.006, 0.01),
        Encoding.TOP_K: (0.15, 0.7, 0.8),
    }
    for compression in COMPRESSIONS:
        received = Received(tmp_path, compression)
        ratio, least, most = bounds[compression.encoding]
        sent = received.path.stat().st_size / received.base.path.stat().st_size
        assert sent == pytest.approx(ratio, rel=0.02)
        assert least < received.error < most


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    """Return a change that puts another tensor under this name."""
    return lambda payload: payload.update({name: tensor})


def element(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    """Return a change of one number of a tensor."""
    return lambda payload: payload[name].view(-1).__setitem__(index, value)


INT8, TOP_K = COMPRESSIONS[2], COMPRESSIONS[3]
CORRUPT: dict[str, tuple[Compression, Callable[[dict[str, Tensor]], object], str]] = {
    "a NaN scale": (INT8, element("scales/m", 2, math.nan), "'scales/m' holds nan at element 2"),
    "a scale below 0": (INT8, element("scales/a", 0, -1.0), "'scales/a' holds -1.0 at element 0"),
    "an infinite scale": (INT8, element("scales/a", 1, math.inf), "a scale is finite"),
    "too few scales": (
        INT8,
        put("scales/a", torch.ones(14)),
        r"'scales/a' is torch.float32 \[14\]; .* int8 has torch.float32 \[15\] there",
    ),
    "no scales": (INT8, lambda payload: payload.pop("scales/a"), "'scales/a' is nothing"),
    "another tensor": (INT8, put("delta/y", torch.ones(1)), "'delta/y' is torch.float32"),
    "a number of another type": (
        INT8,
        put("delta/z", torch.tensor(1.0)),
        r"'delta/z' is torch.float32 \[\]",
    ),
    "a NaN value": (TOP_K, element("values", 3, math.nan), "holds nan at element"),
    "one value too many": (
        TOP_K,
        lambda payload: payload.update({"values": torch.cat([payload["values"], torch.ones(1)])}),
        "'values' is torch.float32",
    ),
    "counts that don't add up": (
        TOP_K,
        lambda payload: payload["counts"].view(-1).__setitem__(0, payload["counts"][0] + 1),
        "they must count the",
    ),
    "a negative count": (
        TOP_K,
        lambda payload: payload.update(
            {"counts": torch.tensor([-1, int(payload["counts"].sum()) + 1], dtype=torch.int32)}
        ),
        "-1 in one chunk",
    ),
    "an index twice": (
        TOP_K,
        lambda payload: payload["offsets"].__setitem__(1, payload["offsets"][0]),
        "'offsets' has .* as number 0 .* of chunk 0; a chunk's indices ascend",
    ),
    "an index out of range": (
        TOP_K,
        lambda payload: payload["offsets"].__setitem__(-1, 255),
        "'offsets' has 65535 as number .* and are below 33469",
    ),
    "all in one chunk": (
        TOP_K,
        lambda payload: payload.update(
            {"counts": torch.tensor([0, int(payload["counts"].sum())], dtype=torch.int32)}
        ),
        "of chunk 1; a chunk's indices ascend",
    ),
}


@pytest.mark.parametrize("fault", CORRUPT)
def test_a_corrupt_payload_is_refused_with_a_reason(tmp_path: Path, fault: str) -> None:
    """Which tensor, where, and what must stand there instead."""
    compression, spoil, words = CORRUPT[fault]
    received = Received(tmp_path, compression)
    received.examine()
    payload = decode_state(received.path.read_bytes())
    spoil(payload)
    received.path.write_bytes(encode_state(payload))
    with pytest.raises(InvalidInput, match=words):
        received.examine()


def test_a_whole_update_is_not_taken_for_a_compressed_update(tmp_path: Path) -> None:
    """What the header says must be what the file holds, either way."""
    received = Received(tmp_path, TOP_K)
    received.compression = INT8
    with pytest.raises(InvalidInput, match="an update compressed by int8 has"):
        received.examine()
    received.compression = NO_COMPRESSION
    with pytest.raises(InvalidInput, match="tensors are missing"):
        received.examine()


def delta_of(federation: SmallFederation, sent: Sent) -> dict[str, Tensor]:
    """Return the delta that arrives of an update."""
    read = read_whole(federation.file_of(sent), step=5)
    return {name: read[name] - tensor for name, tensor in federation.state.items()}


def residual_after(folder: Path, sent: Sent) -> State:
    """Return what comes into force if this update counts."""
    states = ClientStates(folder / f"states-{sent.order.client_id}", run_id="run1")
    return states.promoted(sent.order.order_id).tensors[RESIDUAL]


def test_what_top_k_leaves_out_is_sent_later(tmp_path: Path) -> None:
    """Sent and left over are what was learned and what was left over before, if that counted.

    The same order trained without compression, in the same place, gives what is learned.
    """
    federation = SmallFederation(
        tmp_path / "top-k", compression="top-k", compression_fraction=0.2, lr=0.5
    )
    plain = SmallFederation(tmp_path / "plain", lr=0.5)
    before: State = {name: torch.zeros_like(tensor) for name, tensor in federation.state.items()}
    for counts in (True, False, True, True):
        (order,) = federation.open_round([1])
        plain.model = federation.model
        learned = delta_of(plain, plain.train(replace(order, last_counted_order_id="")))
        sent = federation.train(order)
        arrived = delta_of(federation, sent)
        # Of 15 coordinates a fifth.
        assert sum(int((tensor != 0).sum()) for tensor in arrived.values()) <= 3
        if not counts:
            # It came too late: the next order names the order before, and what that left over.
            continue
        after = residual_after(tmp_path / "top-k", sent)
        for name, tensor in learned.items():
            torch.testing.assert_close(
                arrived[name] + after[name], tensor + before[name], rtol=0, atol=1e-12
            )
        before = after
        federation.close_round([sent])
    assert any(bool((tensor != 0).any()) for tensor in before.values())


@pytest.mark.parametrize("compression", ["bfloat16", "int8", "top-k"])
def test_a_round_is_the_formula_written_out_and_repeats(tmp_path: Path, compression: str) -> None:
    """Sum n_i (w + C(d_i)) / sum n_i over two rounds; an order trained again gives its bytes."""
    federation = SmallFederation(tmp_path, compression=compression, lr=0.5)
    for _ in range(2):
        base = federation.state
        orders = federation.open_round([0, 1, 2])
        sent = [federation.train(order) for order in orders]
        payloads = [update.payload.read_bytes() for update in sent]
        # As after a kill between the state kept and the update kept.
        again = [federation.train(order) for order in orders]
        assert [update.payload.read_bytes() for update in again] == payloads
        assert [update.update.encoding for update in sent] == [compression] * 3
        deltas = [delta_of(federation, update) for update in sent]
        weights = [update.update.num_examples for update in sent]
        federation.close_round(sent)
        for name, values in federation.state.items():
            moved = sum(w * d[name] for w, d in zip(weights, deltas, strict=True)) / sum(weights)
            torch.testing.assert_close(values, base[name] + moved, rtol=1e-12, atol=1e-14)


@BY_ENCODING
def test_a_late_update_is_read_from_its_own_base(tmp_path: Path, compression: Compression) -> None:
    """And moves the newest model by its delta over the root of 1 + staleness."""
    received = Received(tmp_path, compression)
    newest = write_state(tmp_path, a_state(7))
    late = update_file(
        received.path,
        base=newest,
        kinds=KINDS,
        compression=compression,
        sections=[(MODEL_SECTION, received.path.stat().st_size)],
        num_examples=3,
        own_base=received.base.path,
        staleness=3,
    )
    expected = received.expected()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in read_whole(late, step=999).items()
    )
    rule = find_strategy("fedbuff")
    made: dict[str, list[Tensor]] = {}
    for block in next_blocks(rule, Cohort(base=newest, updates=[late], kinds=KINDS)):
        made.setdefault(block.block.name, []).append(block.values.clone())
    was, now = a_state(0), a_state(7)
    for name, shape in SHAPES.items():
        moved = now[name].double() + (expected[name].double() - was[name].double()) / 2
        result = torch.cat(made[name]).view(shape).double()
        torch.testing.assert_close(result, moved, rtol=1e-6, atol=1e-6)

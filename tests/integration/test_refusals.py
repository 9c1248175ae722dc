"""Updates that must not enter a model: refused with a sentence, on record; the round goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fedrounds.tensors.codec import digest_bytes
from fedrounds.tensors.entries import entry_kinds
from fedrounds.tensors.payloads import write_payload
from fedrounds.types import EntryKind
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.conftest import MAX_NUM_EXAMPLES, History
from tests.integration.peer import (
    OpenRound,
    Peer,
    State,
    changed,
    entry_of,
    expect_status,
    is_finite,
    open_round,
    payload_of,
)
from tests.processes import Scene
from tests.tiny_task import tiny

WEIGHT = "0.weight"
CLEAR = "\x1b[2J"
"""Clears a terminal."""


def with_value(state: State, value: float) -> State:
    """Return the model with one number of one tensor replaced."""
    spoilt = changed(state)
    spoilt[WEIGHT][3, 5] = value
    return spoilt


def without_weight(state: State) -> State:
    """Return the model with a tensor missing."""
    return {name: tensor for name, tensor in changed(state).items() if name != WEIGHT}


CONTENTS: dict[str, tuple[Callable[[State], State], str]] = {
    "a missing tensor": (without_weight, f"missing: '{WEIGHT}'"),
    "an unknown tensor": (
        lambda state: changed(state) | {"extra": torch.zeros(2)},
        "no tensors named 'extra'",
    ),
    "a name that a terminal obeys": (
        lambda state: changed(state) | {CLEAR * 1000: torch.zeros(2)},
        r"no tensors named '\x1b[2J\x1b[2J",
    ),
    "another shape": (
        lambda state: changed(state) | {WEIGHT: torch.zeros(8, 16)},
        f"'{WEIGHT}' has shape [8, 16]",
    ),
    "another dtype": (
        lambda state: changed(state) | {WEIGHT: state[WEIGHT].double()},
        f"'{WEIGHT}' has shape [16, 8] and dtype torch.float64",
    ),
    # Element 3 * 8 + 5 of a [16, 8] tensor.
    "a NaN": (lambda state: with_value(state, torch.nan), f"'{WEIGHT}' holds nan at element 29"),
    "an infinity": (
        lambda state: with_value(state, -torch.inf),
        f"'{WEIGHT}' holds -inf at element 29",
    ),
    "an absurd norm": (lambda state: changed(state, by=1e6), "away from the global model"),
}

HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "no examples": ({"num_examples": 0}, "num_examples is 0"),
    "minus five examples": ({"num_examples": -5}, "num_examples is -5"),
    "too many examples": (
        {"num_examples": MAX_NUM_EXAMPLES + 1},
        f"must lie in 1 to {MAX_NUM_EXAMPLES}",
    ),
    "the largest number of examples": ({"num_examples": 2**63 - 1}, "num_examples is"),
    "negative steps": ({"num_steps": -1}, "num_steps is -1"),
    # 10 examples make at most 10 steps an epoch, and there are 2 epochs.
    "more steps than examples": ({"num_steps": 21}, "num_steps is 21; it must lie in 0 to 20"),
    "an undeclared metric": ({"metrics": {"postcode": 1.0}}, "metric 'postcode'"),
    "a metric with a long name": (
        {"metrics": {CLEAR * 10_000: 1.0}},
        r"metric '\x1b[2J\x1b[2J",
    ),
    "a metric that is NaN": ({"metrics": {"loss": torch.nan}}, "metric 'loss' is nan"),
    "a payload twice the model": ({"size_bytes": 1 << 22}, "sections"),
    "an oversized payload": (
        {"size_bytes": 1 << 22, "sections": [pb.Section(name="model", size_bytes=1 << 22)]},
        "the payload has 4194304 bytes; the model has",
    ),
    "the largest size on record": (
        {"size_bytes": 2**63 - 1, "sections": [pb.Section(name="model", size_bytes=2**63 - 1)]},
        "the payload has 9223372036854775807 bytes",
    ),
    "no section": ({"sections": []}, "sections []"),
    "a section nobody knows": ({"sections": [pb.Section(name="control")]}, "['control']"),
}


def expect_refused_and_recorded(
    opened: OpenRound, history: History, answer: pb.UploadUpdateResponse, sentence: str
) -> None:
    """Check receipt, record and incident of client 0's update, and that the others go on."""
    assert answer.receipt == pb.RECEIPT_REFUSED
    assert sentence in answer.reason
    assert len(answer.reason) <= 1000
    assert answer.reason.isprintable()
    assert opened.settle(1, 2) == [pb.RECEIPT_STORED] * 2
    next_round = open_round(opened.peers)
    assert next_round.orders[1].round == opened.orders[1].round + 1
    assert is_finite(next_round.base)
    next_round.settle()
    recorded = history()
    json.dumps(recorded, allow_nan=False)
    entry = entry_of(recorded, opened.orders[0])
    assert entry["phase"] == "DONE"
    verdicts = {update["client"]: update["verdict"] for update in entry["updates"]}
    assert verdicts == {0: "REFUSED", 1: "COUNTED", 2: "COUNTED"}
    assert entry["updates"][0]["reason"] == answer.reason
    (incident,) = entry["incidents"]
    assert (incident["kind"], incident["client"]) == ("update-refused", 0)
    assert incident["reason"] == answer.reason


@pytest.mark.parametrize("fault", CONTENTS)
def test_bad_content_is_refused_and_the_round_goes_on(
    opened: OpenRound, history: History, fault: str
) -> None:
    """No wrong tensor and no absurd number reaches the model; the sender learns which and where."""
    make, sentence = CONTENTS[fault]
    answer = opened.peers[0].upload(opened.orders[0], payload_of(make(opened.base)))
    expect_refused_and_recorded(opened, history, answer, sentence)


@pytest.mark.parametrize("fault", HEADERS)
def test_an_impossible_header_is_refused_and_the_round_goes_on(
    opened: OpenRound, history: History, fault: str
) -> None:
    """What an update says of itself must be possible; if not, none of its bytes are taken."""
    changes, sentence = HEADERS[fault]
    payload = payload_of(changed(opened.base))
    answer = opened.peers[0].upload(opened.orders[0], payload, **changes)
    expect_refused_and_recorded(opened, history, answer, sentence)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sections": [pb.Section()] * 9}, "sections has 9 values; it must have from 0 to 8"),
        ({"sections": [pb.Section()] * 200_000}, "header has .* bytes; it may have 262144"),
        ({"sections": [pb.Section(digest="patient 17")]}, "isn't a digest"),
    ],
    ids=["sections", "bytes", "text"],
)
def test_a_header_that_would_take_long_to_read_is_not_read(
    opened: OpenRound, changes: dict[str, Any], words: str
) -> None:
    """Whoever sends it: before anybody's session or order is looked for."""
    peer, order = opened.peers[0], opened.orders[0]
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: peer.upload(order, b"bytes", session_id="nobody's", **changes),
        match=words,
    )


def test_of_an_update_that_comes_too_late_no_text_is_kept(
    opened: OpenRound, history: History
) -> None:
    """A record has places for metrics and sections that have a meaning, and for no other."""
    peer, order = opened.peers[0], opened.orders[0]
    assert peer.report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
    names: dict[str, Any] = {
        "metrics": {"patient 17": 1.0, "loss": 0.5},
        "sections": [pb.Section(name="patient")],
    }
    assert peer.upload(order, b"bytes", **names).receipt == pb.RECEIPT_LATE
    entry = entry_of(history(), order)
    assert [update["metrics"] for update in entry["updates"]] == [{"loss": 0.5}]
    assert "patient" not in json.dumps(entry)


def test_numbers_that_are_none_are_shown_by_their_names(
    opened: OpenRound, session_scene: Scene
) -> None:
    """They are kept of a refused update, and no table stumbles over them."""
    peer, order = opened.peers[0], opened.orders[0]
    metrics = dict.fromkeys(("train_s", "loss", "compression_error"), torch.nan)
    assert peer.upload(order, b"bytes", metrics=metrics).receipt == pb.RECEIPT_REFUSED
    state_dir = session_scene.folder / "server"
    shown = session_scene.command("show", "--state-dir", state_dir, "--round", str(order.round))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert " nan" in shown.stdout


def test_a_section_with_another_digest_than_its_header_says_is_refused(
    opened: OpenRound, history: History
) -> None:
    """The digest of a section may be left out; where it is given it is examined."""
    payload = payload_of(changed(opened.base))
    wrong = pb.Section(name="model", size_bytes=len(payload), digest=digest_bytes(b"other"))
    answer = opened.peers[0].upload(opened.orders[0], payload, sections=[wrong])
    sentence = f"section 'model' has the digest {digest_bytes(payload)}, but the header says"
    expect_refused_and_recorded(opened, history, answer, sentence)


def test_bytes_that_are_no_safetensors_file_are_refused(
    opened: OpenRound, history: History
) -> None:
    """A payload of the right digest and any content is examined before it is believed."""
    answer = opened.peers[0].upload(opened.orders[0], b"\xff" * 2000)
    expect_refused_and_recorded(opened, history, answer, "not a safetensors file")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dtype": CLEAR * 50_000, "shape": []}, r"tensor 'w' has dtype '\x1b[2J\x1b[2J"),
        ({"dtype": "F32", "shape": CLEAR * 50_000}, r"tensor 'w' has shape '\x1b[2J\x1b[2J"),
    ],
)
def test_a_reason_is_short_whatever_a_header_holds(
    opened: OpenRound, history: History, fields: dict[str, object], sentence: str
) -> None:
    """What a client wrote is quoted, as far as a line bears it."""
    text = json.dumps({"w": fields | {"data_offsets": [0, 4]}}).encode()
    payload = len(text).to_bytes(8, "little") + text + b"\0" * 4
    answer = opened.peers[0].upload(opened.orders[0], payload)
    expect_refused_and_recorded(opened, history, answer, sentence)


def test_a_refused_order_stays_refused(opened: OpenRound, history: History) -> None:
    """A client can't mend a refusal by sending something else; that it tried is on record, once."""
    peer, order = opened.peers[0], opened.orders[0]
    bad, other = payload_of(with_value(opened.base, torch.nan)), payload_of(changed(opened.base))
    first = peer.upload(order, bad)
    for payload in (bad, other, other, payload_of(changed(opened.base, by=0.02))):
        again = peer.upload(order, payload)
        assert (again.receipt, again.reason) == (pb.RECEIPT_REFUSED, first.reason)
    refused, contradicted = entry_of(history(), order)["incidents"]
    assert (refused["kind"], contradicted["kind"]) == ("update-refused", "update-contradicted")
    assert contradicted["first"] == digest_bytes(bad)
    assert contradicted["second"] == digest_bytes(other)


def test_a_round_without_any_good_update_fails_and_is_tried_again(
    opened: OpenRound, history: History
) -> None:
    """Where nothing good came, the model stays as it was and the next attempt begins from it."""
    bad = payload_of(with_value(opened.base, torch.nan))
    for client_id, peer in opened.peers.items():
        assert peer.upload(opened.orders[client_id], bad).receipt == pb.RECEIPT_REFUSED
    again = open_round(opened.peers)
    before, after = opened.orders[0], again.orders[0]
    assert (after.round, after.attempt) == (before.round, before.attempt + 1)
    assert after.sections == before.sections
    assert after.seed != before.seed
    again.settle()
    failed = entry_of(history(), before)
    assert failed["phase"] == "FAILED"
    assert failed["incidents"][-1]["kind"] == "round-failed"


@pytest.mark.parametrize(
    ("value", "digest", "words"),
    [
        (float("nan"), None, "holds nan"),
        (1e9, None, "control variates change by"),
        (0.01, digest_bytes(b"other"), "section 'control' has the digest"),
    ],
)
def test_bad_control_variates_are_refused(
    scene: Scene, tmp_path: Path, value: float, digest: str | None, words: str
) -> None:
    """SCAFFOLD's second section is examined like the first; the other client goes on."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, "--min-clients", 2, "--min-updates", 1),
        *("--strategy", "scaffold", "--strategy-parameters", "num_clients=2", "--farewell", 0),
        *("--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    kinds = entry_kinds(tiny.build_model())
    parameters = [name for name, kind in kinds.items() if kind is EntryKind.PARAMETER]
    peers = {client_id: Peer(server.address, client_id) for client_id in (0, 1)}
    opened = open_round(peers)

    def send(client: int, value: float, digest: str | None = None) -> Any:  # noqa: ANN401
        control = {name: torch.full_like(opened.base[name], value) for name in parameters}
        path = tmp_path / f"{client}"
        sections = write_payload(path, {"model": changed(opened.base), "control": control})
        declared = [
            pb.Section(name=section.name, size_bytes=section.size_bytes, digest=section.digest)
            for section in sections
        ]
        declared[1].digest = digest or declared[1].digest
        return peers[client].upload(opened.orders[client], path.read_bytes(), sections=declared)

    refused = send(0, value, digest)
    assert refused.receipt == pb.RECEIPT_REFUSED
    assert words in refused.reason
    assert send(1, 0.01).receipt == pb.RECEIPT_STORED
    assert open_round({1: peers[1]}).orders[1].round == 2
    for peer in peers.values():
        peer.close()

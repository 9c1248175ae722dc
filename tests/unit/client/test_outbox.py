"""The outbox: an update is there whole or not at all, whatever the process died of."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedclient.outbox import Outbox
from fedrounds.types import ClientUpdate
from tests.factories import make_update

PAYLOAD = bytes(range(256)) * 8


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    """Give an empty outbox."""
    return Outbox(tmp_path / "outbox")


def put(outbox: Outbox, order_id: str) -> ClientUpdate:
    """Put an update as a client does: its payload as a draft, then the rest."""
    update = make_update(order_id, payload=PAYLOAD, metrics={"loss": 0.1, "accuracy": 1 / 3})
    update = replace(update, measurements={"f1/tp": (1.0, 2.0)})
    outbox.draft_path(order_id).write_bytes(PAYLOAD)
    outbox.put(update)
    return update


def test_an_update_that_was_put_is_there_for_another_process(
    outbox: Outbox, tmp_path: Path
) -> None:
    """Every field and every byte, until it is dropped; then it is gone."""
    update = put(outbox, "order-1")
    again = Outbox(tmp_path / "outbox")
    assert again.find("order-1") == update
    assert again.payload_path("order-1").read_bytes() == PAYLOAD
    assert again.find("order-2") is None
    again.drop("order-1")
    assert again.find("order-1") is None
    assert list((tmp_path / "outbox").iterdir()) == []
    again.drop("order-1")


def test_all_that_wait_are_listed_once(outbox: Outbox) -> None:
    """In the order of their names, none twice."""
    updates = [put(outbox, f"order-{number}") for number in (2, 1, 3)]
    assert outbox.waiting() == sorted(updates, key=lambda update: update.order_id)


@pytest.mark.parametrize("step", ["draft", "payload", "half a description"])
def test_a_put_cut_off_by_death_leaves_nothing_to_send(
    outbox: Outbox, tmp_path: Path, step: str
) -> None:
    """Killed after any step of a put: not there, cleared away, and put again without harm."""
    folder = tmp_path / "outbox"
    good = put(outbox, "good")
    put(outbox, "cut")
    description = folder / "cut.json"
    if step == "half a description":
        description.rename(folder / "cut.json.draft")
        (folder / "cut.json.draft").write_bytes(b'{"order_id": "cu')
    else:
        description.unlink()
        if step == "draft":
            outbox.payload_path("cut").rename(outbox.draft_path("cut"))
    assert outbox.find("cut") is None
    assert outbox.waiting() == [good]
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"good"}
    update = put(outbox, "cut")
    assert outbox.find("cut") == update


@pytest.mark.parametrize(
    "payload",
    [b"", PAYLOAD[:-1], PAYLOAD + b"x", bytes(len(PAYLOAD)), b"\xff" + PAYLOAD[1:]],
    ids=["empty", "short", "long", "zeros", "one byte"],
)
def test_a_damaged_payload_is_never_sent(outbox: Outbox, payload: bytes) -> None:
    """After a loss of power the bytes may be others, of the same length even: train again."""
    put(outbox, "order")
    outbox.payload_path("order").write_bytes(payload)
    assert outbox.find("order") is None
    assert outbox.waiting() == []
    assert not outbox.payload_path("order").exists()


@pytest.mark.parametrize(
    "description",
    [b"", b"\0" * 300, b"{", b"[]", b"5", b"null", b"{}", b'{"sections": 5}', b"\xff\xfe"],
)
def test_a_damaged_description_is_no_update(
    outbox: Outbox, tmp_path: Path, description: bytes
) -> None:
    """Whatever stands in the file, the client goes on without it."""
    put(outbox, "order")
    (tmp_path / "outbox" / "order.json").write_bytes(description)
    assert outbox.find("order") is None
    assert outbox.waiting() == []
    assert list((tmp_path / "outbox").iterdir()) == []

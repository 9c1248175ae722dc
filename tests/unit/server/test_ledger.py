"""The ledger's entries: canonical bytes, pinned, and a chain that shows what was changed."""

import json
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3

from fedserver.ledger import (
    GENESIS,
    LedgerEntry,
    LedgerUpdate,
    RollbackEntry,
    entry_digest,
    read_entry,
)

UPDATE = LedgerUpdate(
    order_id="o",
    client_id=3,
    num_examples=5,
    num_steps=2,
    global_loss=None,
    digest="cc",
    encoding="state-dict",
    delta_norm=1.5,
    verdict="COUNTED",
)
STALE = replace(
    UPDATE,
    base_digest="ee",
    staleness=2,
    sections=(("model", 7), ("control", 4)),
)


def make_entry(**changed: Any) -> bytes:  # noqa: ANN401
    """Return the entry of a round, but for what is changed."""
    values: dict[str, Any] = {
        "run_id": "run1",
        "round_number": 1,
        "attempt": 2,
        "base_digest": "aa",
        "base_state_digest": None,
        "model_digest": "bb",
        "state_digest": "dd",
        "settings": {"lr": 0.1, "task": "t"},
        "adjustments": {"lr_factor": 0.5},
        "updates": [UPDATE],
        "previous": GENESIS,
    }
    return LedgerEntry(**values | changed).to_bytes()


def test_the_bytes_of_an_entry_are_pinned() -> None:
    """Sorted keys, no spaces: an entry written today is verified by the software of tomorrow."""
    expected = (
        '{"adjustments":{"lr_factor":0.5},"attempt":2,"base":"aa","base_state":null,"model":"bb",'
        '"previous":"' + "0" * 64 + '","round":1,'
        '"run":"run1","settings":{"lr":0.1,"task":"t"},"state":"dd",'
        '"updates":[{"client":3,"delta_norm":1.5,"digest":"cc","encoding":"state-dict",'
        '"global_loss":null,"num_examples":5,"num_steps":2,"order_id":"o","verdict":"COUNTED"}]}'
    ).encode()
    assert make_entry() == expected
    assert entry_digest(expected) == blake3(expected).hexdigest()
    assert make_entry(settings={"task": "t", "lr": 0.1}) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"run_id": "run2"},
        {"round_number": 2},
        {"attempt": 1},
        {"base_digest": "ab"},
        {"base_state_digest": "ab"},
        {"model_digest": "ba"},
        {"state_digest": None},
        {"settings": {"lr": 0.2, "task": "t"}},
        {"adjustments": {}},
        {"updates": []},
        {"updates": [UPDATE, UPDATE]},
        {"updates": [replace(UPDATE, num_examples=6)]},
        {"previous": "1" * 64},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_changes_changes_the_digest(changed: dict[str, Any]) -> None:
    """No field of a round can be altered without its digest, and so the next entry, showing it."""
    assert entry_digest(make_entry(**changed)) != entry_digest(make_entry())


def test_the_order_of_aggregation_is_part_of_the_entry() -> None:
    """The list of updates is kept as it was aggregated, not sorted anew."""
    updates = [replace(UPDATE, client_id=client) for client in (2, 1)]
    recorded = json.loads(make_entry(updates=updates))["updates"]
    assert [update["client"] for update in recorded] == [2, 1]


def test_an_entry_holds_no_number_that_json_lacks() -> None:
    """NaN and infinity would make bytes that other readers refuse."""
    with pytest.raises(ValueError, match="JSON"):
        make_entry(settings={"lr": float("inf")})


def test_the_bytes_of_a_stale_update_of_two_sections_are_pinned() -> None:
    """Only such an update names its base, its staleness and its sections."""
    expected = (
        '{"base":"ee","client":3,"delta_norm":1.5,"digest":"cc","encoding":"state-dict",'
        '"global_loss":null,"num_examples":5,"num_steps":2,"order_id":"o",'
        '"sections":[["model",7],["control",4]],"staleness":2,"verdict":"COUNTED"}'
    )
    assert expected.encode() in make_entry(updates=[STALE])


def test_the_bytes_of_a_rollback_are_pinned() -> None:
    """It says which model is taken back for which."""
    entry = RollbackEntry(
        run_id="run1",
        round_number=1,
        attempt=2,
        base_digest="aa",
        model_digest="bb",
        previous="cc",
    )
    assert entry.to_bytes() == (
        b'{"attempt":2,"previous":"cc","rolled_back":"bb","round":1,"run":"run1","to":"aa"}'
    )
    assert read_entry(entry.to_bytes().decode()) == entry


def test_an_entry_is_read_as_it_was_written() -> None:
    """Written again it has the same bytes; an update of an older entry names no encoding."""
    written = make_entry(updates=[UPDATE, STALE])
    entry = read_entry(written.decode())
    assert isinstance(entry, LedgerEntry)
    assert entry.updates == [UPDATE, STALE]
    assert entry.to_bytes() == written
    older = json.loads(written)
    del older["updates"][0]["encoding"]
    assert read_entry(json.dumps(older)) == entry

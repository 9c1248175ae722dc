"""The ledger's entries: canonical bytes, pinned, and a chain that shows what was changed."""

import json
from typing import Any

import pytest
from blake3 import blake3

from fedserver.ledger import GENESIS, entry_bytes, entry_digest

UPDATE = {"order_id": "o", "client": 3, "num_examples": 5, "digest": "cc", "verdict": "COUNTED"}


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
    return entry_bytes(**values | changed)


def test_the_bytes_of_an_entry_are_pinned() -> None:
    """Sorted keys, no spaces: an entry written today is verified by the software of tomorrow."""
    expected = (
        '{"adjustments":{"lr_factor":0.5},"attempt":2,"base":"aa","base_state":null,"model":"bb",'
        '"previous":"' + "0" * 64 + '","round":1,'
        '"run":"run1","settings":{"lr":0.1,"task":"t"},"state":"dd",'
        '"updates":[{"client":3,"digest":"cc",'
        '"num_examples":5,"order_id":"o","verdict":"COUNTED"}]}'
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
        {"updates": [UPDATE | {"num_examples": 6}]},
        {"previous": "1" * 64},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_changes_changes_the_digest(changed: dict[str, Any]) -> None:
    """No field of a round can be altered without its digest, and so the next entry, showing it."""
    assert entry_digest(make_entry(**changed)) != entry_digest(make_entry())


def test_the_order_of_aggregation_is_part_of_the_entry() -> None:
    """The list of updates is kept as it was aggregated, not sorted anew."""
    updates = [UPDATE | {"client": client} for client in (2, 1)]
    found = json.loads(make_entry(updates=updates))["updates"]
    assert [one["client"] for one in found] == [2, 1]


def test_an_entry_holds_no_number_that_json_lacks() -> None:
    """NaN and infinity would make bytes that other readers refuse."""
    with pytest.raises(ValueError, match="JSON"):
        make_entry(settings={"lr": float("inf")})

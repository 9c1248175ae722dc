"""The ledger's chain and the tables beside it, as values: what is a finding, and what is none."""

from dataclasses import replace
from typing import Any

import pytest

from fedserver.ledger import GENESIS, LedgerEntry, LedgerUpdate, RollbackEntry, entry_digest
from fedserver.phases import OrderState, Phase, RoundEvent
from fedserver.records import AttemptRow, Ledger, LedgerRow
from fedserver.verification.chain import (
    chain_findings,
    every_entry,
    finished_rounds,
    row_findings,
    whole_entries,
)

SETTINGS = {"lr": 0.1}
UPDATE = LedgerUpdate(
    order_id="o1",
    client_id=1,
    num_examples=5,
    num_steps=2,
    global_loss=None,
    digest="dd",
    encoding="state-dict",
    delta_norm=1.5,
    verdict="COUNTED",
)


def make_entry(number: int, *, previous: str, **changes: Any) -> LedgerEntry:  # noqa: ANN401
    """Return the entry of a round whose model is named by its number, and `changes`."""
    entry = LedgerEntry(
        run_id="run1",
        round_number=number,
        attempt=1,
        base_digest=f"model-{number - 1}",
        base_state_digest=None,
        model_digest=f"model-{number}",
        state_digest=None,
        settings=SETTINGS,
        adjustments={},
        updates=[UPDATE],
        previous=previous,
    )
    return replace(entry, **changes)


def row_of(entry: LedgerEntry | RollbackEntry, **changes: Any) -> LedgerRow:  # noqa: ANN401
    """Return the row of an entry, and `changes`."""
    content = entry.to_bytes()
    kind = RoundEvent.FINISH if isinstance(entry, LedgerEntry) else RoundEvent.ROLL_BACK
    row = LedgerRow(
        round_number=entry.round_number,
        attempt=entry.attempt,
        kind=kind,
        entry=content.decode(),
        digest=entry_digest(content),
    )
    return replace(row, **changes)


def attempt_of(entry: LedgerEntry, **changes: Any) -> AttemptRow:  # noqa: ANN401
    """Return the attempt that an entry is of, as the tables have it, and `changes`."""
    attempt = AttemptRow(
        round_number=entry.round_number,
        attempt=entry.attempt,
        phase=Phase.DONE,
        base_digest=entry.base_digest,
        base_state_digest=entry.base_state_digest,
        model_digest=entry.model_digest,
        state_digest=entry.state_digest,
        adjustments=entry.adjustments,
        updates=entry.updates,
    )
    return replace(attempt, **changes)


def make_ledger(num_rounds: int = 3) -> Ledger:
    """Return the ledger of a run of rounds that are all done, and its tables."""
    entries: list[LedgerEntry] = []
    rows: list[LedgerRow] = []
    previous = GENESIS
    for number in range(1, num_rounds + 1):
        entries.append(make_entry(number, previous=previous))
        rows.append(row_of(entries[-1]))
        previous = rows[-1].digest
    return Ledger(
        run_id="run1",
        settings=SETTINGS,
        head=previous,
        entries=rows,
        attempts=[attempt_of(entry) for entry in entries],
    )


def findings_of(ledger: Ledger) -> list[str]:
    """Return all findings, those of the chain first."""
    return [*chain_findings(ledger), *row_findings(ledger)]


def test_a_whole_ledger_has_no_findings() -> None:
    """Also one of a run that has no round yet."""
    ledger = make_ledger()
    assert findings_of(ledger) == []
    assert finished_rounds(ledger) == [1, 2, 3]
    assert whole_entries(ledger).keys() == {1, 2, 3}
    assert findings_of(replace(ledger, head=None, entries=[], attempts=[])) == []


@pytest.mark.parametrize("verdict", OrderState)
def test_an_update_that_only_the_table_has_is_a_finding_unless_it_came_after(
    verdict: OrderState,
) -> None:
    """Those that are LATE or ABANDONED come in after the entry was written."""
    ledger = make_ledger()
    extra = replace(UPDATE, order_id="o2", client_id=2, verdict=verdict)
    last = ledger.attempts[-1]
    ledger = replace(
        ledger, attempts=[*ledger.attempts[:-1], replace(last, updates=[UPDATE, extra])]
    )
    expected = f"run1, round 3: the update of client 2 ({verdict}) has a row, but isn't in the"
    findings = findings_of(ledger)
    if verdict in (OrderState.LATE, OrderState.ABANDONED):
        assert findings == []
    else:
        assert [finding.startswith(expected) for finding in findings] == [True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"staleness": 2, "base_digest": "model-1"}, ("base is model-1", "staleness is 2")),
        ({"sections": (("model", 3), ("control", 4))}, ("sections is",)),
        ({"encoding": "int8"}, ("encoding is int8 in its row, state-dict in the ledger",)),
    ],
)
def test_what_stands_on_one_side_only_is_a_finding(
    changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    """An entry holds base, staleness and sections only where there is something to say."""
    ledger = make_ledger()
    last = replace(ledger.attempts[-1], updates=[replace(UPDATE, **changes)])
    findings = findings_of(replace(ledger, attempts=[*ledger.attempts[:-1], last]))
    assert len(findings) == len(words)
    for finding, expected in zip(findings, words, strict=True):
        assert expected in finding


def test_a_rolled_back_round_is_not_in_force() -> None:
    """Its entry can be relied on, but the round's model is that of the attempt after."""
    ledger = make_ledger(2)
    bad = make_entry(2, previous=ledger.entries[0].digest)
    rolled_back = row_of(
        RollbackEntry(
            run_id="run1",
            round_number=2,
            attempt=1,
            base_digest="model-1",
            model_digest="model-2",
            previous=ledger.entries[1].digest,
        )
    )
    again = make_entry(2, previous=rolled_back.digest, attempt=2, model_digest="model-2b")
    ledger = replace(
        ledger,
        head=row_of(again).digest,
        entries=[*ledger.entries, rolled_back, row_of(again)],
        attempts=[
            ledger.attempts[0],
            attempt_of(bad, phase=Phase.ROLLED_BACK),
            attempt_of(again),
        ],
    )
    assert findings_of(ledger) == []
    assert finished_rounds(ledger) == [1, 2]
    assert every_entry(ledger).keys() == {(1, 1), (2, 1), (2, 2)}
    assert whole_entries(ledger)[2].model_digest == "model-2b"
    # The table says that the bad round is done: the ledger's word counts.
    done = replace(ledger, attempts=[ledger.attempts[0], attempt_of(bad), attempt_of(again)])
    (finding,) = findings_of(done)
    assert "attempt 1 was rolled back, in the table of rounds it is DONE" in finding


def test_a_round_that_is_rolled_back_and_not_repeated_yet_has_no_model() -> None:
    """No entry of it is in force."""
    ledger = make_ledger(2)
    entry = RollbackEntry(
        run_id="run1",
        round_number=2,
        attempt=1,
        base_digest="model-1",
        model_digest="model-2",
        previous=ledger.entries[1].digest,
    )
    bad = replace(ledger.attempts[1], phase=Phase.ROLLED_BACK)
    ledger = replace(
        ledger,
        head=row_of(entry).digest,
        entries=[*ledger.entries, row_of(entry)],
        attempts=[ledger.attempts[0], bad],
    )
    assert findings_of(ledger) == []
    assert finished_rounds(ledger) == [1]
    assert whole_entries(ledger).keys() == {1}


@pytest.mark.parametrize("column", ["digest", "entry"])
def test_an_entry_with_another_digest_is_not_relied_on(column: str) -> None:
    """It is one finding, whichever of the two is damaged; the tables aren't compared with it."""
    ledger = make_ledger()
    row = ledger.entries[1]
    if column == "digest":
        damaged = replace(row, digest="ff" * 32)
    else:
        damaged = replace(row, entry=row.entry.replace("model-2", "model-9"))
    broken = replace(ledger, entries=[ledger.entries[0], damaged, ledger.entries[2]])
    (finding,) = findings_of(broken)
    assert "round 2: its entry in the ledger isn't what was written" in finding
    assert whole_entries(broken).keys() == {1, 3}


def test_the_head_names_the_last_entry() -> None:
    """The run keeps the last digest: an entry cut off at the end is missed."""
    ledger = make_ledger()
    cut = replace(ledger, entries=ledger.entries[:2], attempts=ledger.attempts[:2])
    (finding,) = findings_of(cut)
    assert "the ledger ends with round 2, not with the entry" in finding

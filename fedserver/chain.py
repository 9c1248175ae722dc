"""Whether the ledger is a whole chain, and whether the tables still say what it says.

Each finding is a sentence that names the round and the thing. A round's entry counts as whole if
its bytes are those of its digest and it stands in its own place; only whole ones are compared with
the tables.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from fedserver.ledger import GENESIS, entry_digest
from fedserver.records import Attempt, Ledger, LedgerRow
from fedserver.rounds import OrderState, Phase

Entry = Mapping[str, Any]


def place(run_id: str, round_number: int) -> str:
    """Return how a finding names a round."""
    return f"{run_id}, round {round_number}"


def finished_rounds(ledger: Ledger) -> list[int]:
    """Return the rounds that have an entry or a finished attempt, in order."""
    return sorted({row.round_number for row in ledger.entries} | _finished(ledger).keys())


def whole_entries(ledger: Ledger) -> dict[int, Entry]:
    """Return the entries that can be relied on, by round."""
    found = {
        row.round_number: json.loads(row.entry)
        for row in ledger.entries
        if entry_digest(row.entry.encode()) == row.digest
    }
    return {
        number: entry
        for number, entry in found.items()
        if (entry["run"], entry["round"]) == (ledger.run_id, number)
    }


def chain_findings(ledger: Ledger) -> Iterator[str]:
    """Say where there isn't one entry for each finished round, chained to the one before."""
    rows = {row.round_number: row for row in ledger.entries}
    for before, number in pairwise([0, *finished_rounds(ledger)]):
        if number > before + 1:
            yield f"{ledger.run_id}: {_numbers(range(before + 1, number))} missing altogether"
        if number not in rows:
            yield f"{place(ledger.run_id, number)}: its entry is missing from the ledger"
    for number, row in rows.items():
        for finding in _entry_findings(ledger.run_id, row, before=rows.get(number - 1)):
            yield f"{place(ledger.run_id, number)}: {finding}"
    last = ledger.entries[-1] if ledger.entries else None
    if ledger.head not in ([None] if last is None else _digests_of(last)):
        end = "is empty" if last is None else f"ends with round {last.round_number}"
        yield (
            f"{ledger.run_id}: the ledger {end}, not with the entry {_short(ledger.head)} that "
            "the run has as its last"
        )


def row_findings(ledger: Ledger) -> Iterator[str]:
    """Say where the tables differ from the ledger's whole entries, or a round from the next."""
    entries, finished = whole_entries(ledger), _finished(ledger)
    yield from _settings_findings(ledger, entries)
    for number in finished_rounds(ledger):
        if number not in finished:
            yield (
                f"{place(ledger.run_id, number)}: it is in the ledger, but no finished attempt at "
                "it is in the table of rounds"
            )
        elif number in entries:
            for finding in _differences(entries[number], finished[number]):
                yield f"{place(ledger.run_id, number)}: {finding}"
    models = {number: one.model_digest for number, one in finished.items()}
    models |= {number: entry["model"] for number, entry in entries.items()}
    attempts: dict[int, set[int]] = {}
    for one in ledger.attempts:
        attempts.setdefault(one.round_number, set()).add(one.attempt)
        is_in_entry = one.phase == Phase.DONE and one.round_number in entries
        base = entries[one.round_number]["base"] if is_in_entry else one.base_digest
        ended_with = models.get(one.round_number - 1, base)
        if ended_with != base:
            yield (
                f"{place(ledger.run_id, one.round_number)}: attempt {one.attempt} began with model "
                f"{_short(base)}, the round before ended with {_short(ended_with)}"
            )
    for number, there in attempts.items():
        if missing := sorted(set(range(1, max(there))) - there):
            yield f"{place(ledger.run_id, number)}: attempts {missing} of {max(there)} are missing"


def _entry_findings(run_id: str, row: LedgerRow, *, before: LedgerRow | None) -> Iterator[str]:
    actual = entry_digest(row.entry.encode())
    if actual != row.digest:
        yield (
            f"its entry in the ledger isn't what was written (its digest is {_short(actual)}, "
            f"recorded is {_short(row.digest)})"
        )
        return
    entry = json.loads(row.entry)
    if (entry["run"], entry["round"]) != (run_id, row.round_number):
        yield f"in its place in the ledger is the entry of {place(entry['run'], entry['round'])}"
    if before is None and row.round_number > 1:
        return
    expected = [GENESIS] if before is None else _digests_of(before)
    if entry["previous"] not in expected:
        yield (
            f"its entry in the ledger follows an entry {_short(entry['previous'])}, but the one "
            f"before it is {_short(expected[0])}"
        )


def _settings_findings(ledger: Ledger, entries: Mapping[int, Entry]) -> Iterator[str]:
    differing: dict[str, list[int]] = {}
    for number, entry in entries.items():
        written = entry["settings"]
        for key in written.keys() | ledger.settings.keys():
            if ledger.settings.get(key) != written.get(key):
                what = f"is {ledger.settings.get(key)!r}, in the ledger {written.get(key)!r}"
                differing.setdefault(f"the setting {key!r} {what}", []).append(number)
    for what, numbers in sorted(differing.items()):
        yield f"{ledger.run_id}: {what} ({len(numbers)} rounds, from round {numbers[0]} on)"


def _differences(entry: Entry, row: Attempt) -> Iterator[str]:
    """Say in what the rows of a finished attempt differ from its entry."""
    for what, ours, written in (
        ("the attempt that finished", row.attempt, entry["attempt"]),
        ("its base model", row.base_digest, entry["base"]),
        ("its base's server state", row.base_state_digest, entry["base_state"]),
        ("its model", row.model_digest, entry["model"]),
        ("its server state", row.state_digest, entry["state"]),
    ):
        if ours != written:
            yield f"{what} is {ours} in the table of rounds, {written} in the ledger"
    updates = {one["order_id"]: one for one in row.updates}
    for one in entry["updates"]:
        stored = updates.pop(one["order_id"], None)
        if stored is None:
            yield f"the update of client {one['client']} is in the ledger, but its row is missing"
            continue
        for key in sorted(one.keys() & stored.keys()):
            if stored[key] != one[key]:
                yield (
                    f"the update of client {one['client']}: {key} is {stored[key]} in its row, "
                    f"{one[key]} in the ledger"
                )
    for one in updates.values():
        # These come in after the entry was written, too.
        if one["verdict"] not in (OrderState.LATE, OrderState.ABANDONED):
            yield (
                f"the update of client {one['client']} ({one['verdict']}) has a row, but isn't in "
                "the ledger"
            )


def _finished(ledger: Ledger) -> dict[int, Attempt]:
    return {one.round_number: one for one in ledger.attempts if one.phase == Phase.DONE}


def _digests_of(row: LedgerRow) -> list[str]:
    """Return what the next entry may name: a damaged row is one finding, not two."""
    return [row.digest, entry_digest(row.entry.encode())]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _numbers(numbers: Collection[int]) -> str:
    first, last = min(numbers), max(numbers)
    return f"round {first} is" if first == last else f"rounds {first} to {last} are"

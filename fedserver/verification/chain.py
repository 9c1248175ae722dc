"""Whether the ledger is a whole chain, and whether the tables still say what it says.

Each finding is a sentence that names the round and the thing. A round's entry counts as whole if
its bytes are those of its digest and it stands in its own place. Only whole entries are compared
with the tables.
"""

from collections.abc import Collection, Iterator, Mapping

from fedserver.ledger import GENESIS, LedgerEntry, entry_digest, read_entry
from fedserver.phases import OrderState, Phase, RoundEvent
from fedserver.records import AttemptRow, Ledger, LedgerRow

Key = tuple[int, int]
"""A round and an attempt at it."""

_FINISH = str(RoundEvent.FINISH)


def round_label(run_id: str, round_number: int) -> str:
    """Return the label of a round in findings."""
    return f"{run_id}, round {round_number}"


def finished_rounds(ledger: Ledger) -> list[int]:
    """Return the rounds that an attempt has finished which wasn't rolled back, in order."""
    return sorted({number for number, _ in _finishes(ledger) - _rollbacks(ledger)})


def every_entry(ledger: Ledger) -> dict[Key, LedgerEntry]:
    """Return the entries of finished attempts that can be relied on, also of those rolled back."""
    entries: dict[Key, LedgerEntry] = {}
    for row in ledger.entries:
        if row.kind == _FINISH and entry_digest(row.entry.encode()) == row.digest:
            entry = read_entry(row.entry)
            if isinstance(entry, LedgerEntry) and _is_in_place(ledger.run_id, row):
                entries[row.round_number, row.attempt] = entry
    return entries


def whole_entries(ledger: Ledger) -> dict[int, LedgerEntry]:
    """Return the entries that can be relied on and aren't rolled back, by round."""
    undone = _rollbacks(ledger)
    return {key[0]: entry for key, entry in every_entry(ledger).items() if key not in undone}


def chain_findings(ledger: Ledger) -> Iterator[str]:
    """Report each finish and rollback without an entry that is chained to the entry before."""
    rows = {(row.round_number, row.attempt, row.kind): row for row in ledger.entries}
    # In the order in which they were written: a round is rolled back before it is done again, and
    # before the round after it is done.
    wanted = sorted(
        rows.keys()
        | {(*key, _FINISH) for key in _finishes(ledger)}
        | {(*key, str(RoundEvent.ROLL_BACK)) for key in _rollbacks(ledger)}
    )
    for before, key in zip([None, *wanted], wanted, strict=False):
        number, _, kind = key
        number_before = 0 if before is None else before[0]
        if number > number_before + 1:
            missing = range(number_before + 1, number)
            yield f"{ledger.run_id}: {_numbers(missing)} missing altogether"
        if key not in rows:
            what = "its entry" if kind == _FINISH else "that it was rolled back"
            yield f"{round_label(ledger.run_id, number)}: {what} is missing from the ledger"
            continue
        follows = None if number > number_before + 1 or before is None else rows.get(before)
        is_known = follows is not None or (before is None and number == 1)
        for finding in _entry_findings(
            ledger.run_id, rows[key], before=follows, is_before_known=is_known
        ):
            yield f"{round_label(ledger.run_id, number)}: {finding}"
    last = ledger.entries[-1] if ledger.entries else None
    if ledger.head not in ([None] if last is None else _digests_of(last)):
        end = "is empty" if last is None else f"ends with round {last.round_number}"
        yield (
            f"{ledger.run_id}: the ledger {end}, not with the entry {_short(ledger.head)} that "
            "the run has as its last"
        )


def row_findings(ledger: Ledger) -> Iterator[str]:
    """Yield a sentence where tables and whole entries differ, or a round and the next."""
    entries = whole_entries(ledger)
    finished = {row.round_number: row for row in ledger.attempts if row.phase == Phase.DONE}
    yield from _settings_findings(ledger, entries)
    for number in finished_rounds(ledger):
        if number not in finished:
            yield (
                f"{round_label(ledger.run_id, number)}: it is in the ledger, but no finished "
                "attempt at it is in the table of rounds"
            )
        elif number in entries:
            for finding in _differences(entries[number], finished[number]):
                yield f"{round_label(ledger.run_id, number)}: {finding}"
    yield from _rollback_findings(ledger)
    yield from _base_findings(ledger, entries, finished)
    attempts: dict[int, set[int]] = {}
    for row in ledger.attempts:
        attempts.setdefault(row.round_number, set()).add(row.attempt)
    for number, there in attempts.items():
        if missing := sorted(set(range(1, max(there))) - there):
            label = round_label(ledger.run_id, number)
            yield f"{label}: attempts {missing} of {max(there)} are missing"


def _rollback_findings(ledger: Ledger) -> Iterator[str]:
    """Report where ledger and tables differ about rollbacks."""
    entries = every_entry(ledger)
    rows = {(row.round_number, row.attempt): row for row in ledger.attempts}
    for key in sorted(_rollbacks(ledger)):
        where = round_label(ledger.run_id, key[0])
        row = rows.get(key)
        if row is None or row.phase != Phase.ROLLED_BACK:
            phase = "missing" if row is None else row.phase
            yield f"{where}: attempt {key[1]} was rolled back, in the table of rounds it is {phase}"
        elif key in entries:
            for finding in _differences(entries[key], row):
                yield f"{where}: {finding}"


def _base_findings(
    ledger: Ledger, entries: Mapping[int, LedgerEntry], finished: Mapping[int, AttemptRow]
) -> Iterator[str]:
    """Report each attempt that didn't begin with the model that the round before it ended with.

    An attempt that came to nothing may have begun with a model that was rolled back since.
    """
    models = {number: row.model_digest for number, row in finished.items()}
    models |= {number: entry.model_digest for number, entry in entries.items()}
    undone = [row for row in ledger.attempts if row.phase == Phase.ROLLED_BACK]
    first_models: dict[int, str | None] = {}
    for row in ledger.attempts:
        number = row.round_number
        is_in_entry = row.phase == Phase.DONE and number in entries
        base = entries[number].base_digest if is_in_entry else row.base_digest
        rolled_back = {two.model_digest for two in undone if two.round_number == number - 1}
        if number == 1:
            ended_with = first_models.setdefault(row.adjustments.get("num_redraws", 0), base)
        else:
            ended_with = models.get(number - 1, None if rolled_back else base)
        came_to_nothing = row.phase in (Phase.FAILED, Phase.ABANDONED, Phase.ROLLED_BACK)
        if base != ended_with and not (came_to_nothing and base in rolled_back):
            before = "the attempts" if number == 1 else "the round"
            yield (
                f"{round_label(ledger.run_id, number)}: attempt {row.attempt} began with model "
                f"{_short(base)}, {before} before ended with {_short(ended_with)}"
            )


def _finishes(ledger: Ledger) -> set[Key]:
    """Return the attempts that made a model, as ledger and tables have it.

    Where they differ about which attempt it was, the ledger's word counts.
    """
    entered = {(row.round_number, row.attempt) for row in ledger.entries if row.kind == _FINISH}
    rolled_back = _rollbacks(ledger)
    in_force = {number for number, _ in entered - rolled_back}
    return {
        *entered,
        *rolled_back,
        *(
            (row.round_number, row.attempt)
            for row in ledger.attempts
            if row.phase == Phase.DONE and row.round_number not in in_force
        ),
    }


def _rollbacks(ledger: Ledger) -> set[Key]:
    """Return the attempts whose model was taken back, as ledger and tables have it."""
    return {
        *((row.round_number, row.attempt) for row in ledger.entries if row.kind != _FINISH),
        *(
            (row.round_number, row.attempt)
            for row in ledger.attempts
            if row.phase == Phase.ROLLED_BACK
        ),
    }


def _is_in_place(run_id: str, row: LedgerRow) -> bool:
    """Whether what a row holds is the entry of its own round, attempt and kind."""
    entry = read_entry(row.entry)
    return (entry.run_id, entry.round_number, entry.attempt, isinstance(entry, LedgerEntry)) == (
        run_id,
        row.round_number,
        row.attempt,
        row.kind == _FINISH,
    )


def _entry_findings(
    run_id: str, row: LedgerRow, *, before: LedgerRow | None, is_before_known: bool
) -> Iterator[str]:
    actual = entry_digest(row.entry.encode())
    if actual != row.digest:
        yield (
            f"its entry in the ledger isn't what was written (its digest is {_short(actual)}, "
            f"recorded is {_short(row.digest)})"
        )
        return
    entry = read_entry(row.entry)
    if not _is_in_place(run_id, row):
        label = round_label(entry.run_id, entry.round_number)
        yield f"in its place in the ledger is the entry of {label}"
    if not is_before_known:
        return
    expected = [GENESIS] if before is None else _digests_of(before)
    if entry.previous not in expected:
        yield (
            f"its entry in the ledger follows an entry {_short(entry.previous)}, but the one "
            f"before it is {_short(expected[0])}"
        )


def _settings_findings(ledger: Ledger, entries: Mapping[int, LedgerEntry]) -> Iterator[str]:
    differing: dict[str, list[int]] = {}
    for number, entry in entries.items():
        written = entry.settings
        for key in written.keys() | ledger.settings.keys():
            if ledger.settings.get(key) != written.get(key):
                what = f"is {ledger.settings.get(key)!r}, in the ledger {written.get(key)!r}"
                differing.setdefault(f"the setting {key!r} {what}", []).append(number)
    for what, numbers in sorted(differing.items()):
        yield f"{ledger.run_id}: {what} ({len(numbers)} rounds, from round {numbers[0]} on)"


def _differences(entry: LedgerEntry, row: AttemptRow) -> Iterator[str]:
    """Yield a sentence for each difference between a finished attempt's rows and its entry."""
    for what, stored_value, written in (
        ("the attempt that finished", row.attempt, entry.attempt),
        ("its base model", row.base_digest, entry.base_digest),
        ("its base's server state", row.base_state_digest, entry.base_state_digest),
        ("its model", row.model_digest, entry.model_digest),
        ("its server state", row.state_digest, entry.state_digest),
        ("what was changed for it", row.adjustments, entry.adjustments),
    ):
        if stored_value != written:
            yield f"{what} is {stored_value} in the table of rounds, {written} in the ledger"
    stored = {update.order_id: update for update in row.updates}
    for written_update in entry.updates:
        stored_update = stored.pop(written_update.order_id, None)
        client = f"client {written_update.client_id}"
        if stored_update is None:
            yield f"the update of {client} is in the ledger, but its row is missing"
            continue
        values, written_values = stored_update.as_json(), written_update.as_json()
        for name in sorted(values.keys() | written_values.keys()):
            stored_value, written = values.get(name), written_values.get(name)
            if stored_value != written:
                yield (
                    f"the update of {client}: {name} is {stored_value} in its row, "
                    f"{written} in the ledger"
                )
    for update in stored.values():
        # These come in after the entry was written, too.
        if update.verdict not in (OrderState.LATE, OrderState.ABANDONED):
            yield (
                f"the update of client {update.client_id} ({update.verdict}) has a row, but isn't "
                "in the ledger"
            )


def _digests_of(row: LedgerRow) -> list[str]:
    """Return the digests that the next entry may name: a damaged row is one finding, not two."""
    return [row.digest, entry_digest(row.entry.encode())]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _numbers(numbers: Collection[int]) -> str:
    first, last = min(numbers), max(numbers)
    return f"round {first} is" if first == last else f"rounds {first} to {last} are"

"""Verification: every kind of damage is found by name, and an untouched state-dir is whole."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedrounds.errors import InvalidInput, NotFound
from fedserver.ledger import entry_digest
from fedserver.store import Store
from fedserver.verification.verify import verify
from tests.state_dir import BAD_CLIENT, BAD_ROUND, NUM_ROUNDS, StateDir, write_state_dir

ALL_WHOLE = (
    "4 rounds: chain whole, rows whole, 5 models whole, 8 updates whole, 1 quarantined payload "
    "whole, 4 of 4 re-aggregated"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> StateDir:
    """Give a state-dir that tests copy."""
    return write_state_dir(tmp_path_factory.mktemp("written"))


@pytest.fixture
def state_dir(written: StateDir, tmp_path: Path) -> StateDir:
    """Give a copy of the state-dir that the test may change."""
    copied = StateDir(tmp_path / "server")
    copied.run_id = written.run_id
    shutil.copytree(written.folder, copied.folder)
    return copied


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_untouched_state_dir_is_whole_and_stays_as_it_is(state_dir: StateDir) -> None:
    """Nothing is found, every round is aggregated again to the same bytes, nothing is written."""
    before = {path: path.read_bytes() for path in state_dir.folder.rglob("*") if path.is_file()}
    assert state_dir.verify() == ([], ALL_WHOLE)
    after = {path: path.read_bytes() for path in state_dir.folder.rglob("*") if path.is_file()}
    # SQLite's own shared memory comes and goes with any reader.
    assert {path: content for path, content in after.items() if path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {
        "federation.sqlite-shm",
        "federation.sqlite-wal",
    }


def expect_found(state_dir: StateDir, *expected: tuple[str, ...]) -> str:
    """Check that there is one finding for each tuple of words, and no other; give the summary."""
    findings, summary = state_dir.verify()
    assert len(findings) == len(expected), findings
    for finding, words in zip(findings, expected, strict=True):
        assert all(word in finding for word in words), (finding, words)
    return summary


def test_a_flipped_bit_in_a_model_is_found(state_dir: StateDir) -> None:
    """By the round that made it; the round that rests on it isn't aggregated from it."""
    flip_bit(state_dir.path("models", round_number=3))
    summary = expect_found(state_dir, ("round 3: its model holds other bytes", ".safetensors"))
    # Round 3 can still be made again of what it rested on; round 4 began with the damaged model.
    assert "4 of 5 models whole" in summary
    assert summary.endswith("3 of 4 re-aggregated (1 damaged)")


def test_a_flipped_bit_in_a_kept_update_is_found(state_dir: StateDir) -> None:
    """By round and client."""
    flip_bit(state_dir.path("spool", client=1, round_number=3))
    summary = expect_found(state_dir, ("round 3: the update of client 1 holds other bytes",))
    assert "7 of 8 updates whole" in summary
    assert summary.endswith("3 of 4 re-aggregated (1 damaged)")


def test_a_flipped_bit_in_a_quarantined_payload_is_found(state_dir: StateDir) -> None:
    """By round and client."""
    flip_bit(state_dir.path("quarantine", client=BAD_CLIENT, round_number=BAD_ROUND))
    summary = expect_found(
        state_dir, ("round 2: the quarantined update of client 2 holds other bytes",)
    )
    assert "0 of 1 quarantined payload whole, 4 of 4 re-aggregated" in summary


UPDATE_ROW = "WHERE order_id = (SELECT order_id FROM orders WHERE round = 3 AND client_id = 1)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            f"UPDATE updates SET num_examples = 14 {UPDATE_ROW}",
            ("round 3: the update of client 1: num_examples is 14 in its row, 13 in the ledger",),
        ),
        (
            f"UPDATE updates SET digest = 'abc' {UPDATE_ROW}",
            ("round 3: the update of client 1: digest is abc in its row",),
        ),
        (
            f"UPDATE updates SET delta_norm = 2 {UPDATE_ROW}",
            ("round 3: the update of client 1: delta_norm is 2.0 in its row, 1.0 in the ledger",),
        ),
        (
            "UPDATE orders SET state = 'LATE' WHERE round = 3 AND client_id = 1",
            ("round 3: the update of client 1: verdict is LATE in its row, COUNTED in the ledger",),
        ),
        (
            "UPDATE orders SET client_id = 9 WHERE round = 3 AND client_id = 1",
            ("round 3: the update of client 1: client is 9 in its row, 1 in the ledger",),
        ),
        (
            f"DELETE FROM updates {UPDATE_ROW}",
            ("round 3: the update of client 1 is in the ledger, but its row is missing",),
        ),
        (
            "UPDATE rounds SET model_digest = 'abc' WHERE round = 3",
            ("round 3: its model is abc in the table of rounds",),
        ),
        (
            "UPDATE rounds SET base_digest = 'abc' WHERE round = 3",
            ("round 3: its base model is abc in the table of rounds",),
        ),
        (
            """UPDATE runs SET settings = replace(settings, '"lr": 0.1', '"lr": 0.2')""",
            ("the setting 'lr' is 0.2, in the ledger 0.1 (4 rounds, from round 1 on)",),
        ),
        (
            "DELETE FROM rounds WHERE round = 3",
            ("round 3: it is in the ledger, but no finished attempt at it is",),
        ),
        (
            "UPDATE rounds SET phase = 'FAILED' WHERE round = 3",
            ("round 3: it is in the ledger, but no finished attempt at it is",),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_or_missing_row_is_found(
    state_dir: StateDir, change: str, words: tuple[str, ...]
) -> None:
    """By round, client and column, once; the rounds are aggregated from the ledger all the same."""
    state_dir.change(change)
    summary = expect_found(state_dir, words)
    assert summary == ALL_WHOLE.replace("rows whole", "rows damaged")


def test_another_attempt_number_is_found(state_dir: StateDir) -> None:
    """An attempt that the ledger doesn't know, whose updates are those of none."""
    state_dir.change("UPDATE rounds SET attempt = 2 WHERE round = 3")
    expect_found(
        state_dir,
        ("round 3: the attempt that finished is 2 in the table of rounds, 1 in the ledger",),
        ("round 3: the update of client 0 is in the ledger, but its row is missing",),
        ("round 3: the update of client 1 is in the ledger, but its row is missing",),
        ("round 3: attempts [1] of 2 are missing",),
    )


@pytest.mark.parametrize("number", [1, 3])
def test_an_entry_missing_from_the_ledger_is_found(state_dir: StateDir, number: int) -> None:
    """The first, or one in the middle: its round can't be verified any more."""
    state_dir.change("DELETE FROM ledger WHERE round = ?", number)
    summary = expect_found(state_dir, (f"round {number}: its entry is missing from the ledger",))
    assert "chain damaged, rows whole" in summary
    assert summary.endswith("3 of 4 re-aggregated (1 damaged)")


def test_the_last_entry_missing_is_found(state_dir: StateDir) -> None:
    """The end of a chain is held by the run, and by the round that is done."""
    state_dir.change("DELETE FROM ledger WHERE round = 4")
    expect_found(
        state_dir,
        ("round 4: its entry is missing from the ledger",),
        ("the ledger ends with round 3, not with the entry",),
    )


def test_a_round_missing_everywhere_is_found(state_dir: StateDir) -> None:
    """In the middle by its gap, at the end by the run's word for the last entry."""
    for table in ("ledger", "rounds"):
        state_dir.change(f"DELETE FROM {table} WHERE round IN (2, 4)")
    expect_found(
        state_dir,
        ("round 2 is missing altogether",),
        ("the ledger ends with round 3, not with the entry",),
    )


def test_swapped_entries_are_found(state_dir: StateDir) -> None:
    """Each stands in the other's place, and the chain breaks wherever they touch it."""
    for was, becomes in ((2, -1), (3, 2), (-1, 3)):
        state_dir.change("UPDATE ledger SET round = ? WHERE round = ?", becomes, was)
    findings, summary = state_dir.verify()
    assert any(
        ", round 2: in its place in the ledger is the entry of" in finding for finding in findings
    )
    assert any(
        ", round 3: in its place in the ledger is the entry of" in finding for finding in findings
    )
    assert sum("follows an entry" in finding for finding in findings) == 3
    assert len(findings) == 5
    assert summary.endswith("2 of 4 re-aggregated (2 damaged)")


def flip_entry(state_dir: StateDir, number: int, *, at: int) -> None:
    """Flip a bit of an entry's text."""
    entry = bytearray(state_dir.ask("SELECT entry FROM ledger WHERE round = ?", number).encode())
    entry[at] ^= 0x81
    state_dir.change(
        "UPDATE ledger SET entry = CAST(? AS TEXT) WHERE round = ?", bytes(entry), number
    )


@pytest.mark.parametrize("at", [0, 5, 100, -1])
def test_a_flipped_bit_in_an_entry_is_found(state_dir: StateDir, at: int) -> None:
    """Also where its text is no JSON and no UTF-8 any more; the chain around it stays whole."""
    flip_entry(state_dir, 3, at=at)
    expect_found(state_dir, ("round 3: its entry in the ledger isn't what was written",))


def test_a_changed_digest_of_an_entry_is_found(state_dir: StateDir) -> None:
    """The digest in the row, and the digest that the run has as its last."""
    state_dir.change("UPDATE ledger SET digest = 'abc' WHERE round = 3")
    expect_found(state_dir, ("round 3: its entry in the ledger isn't", "recorded is abc"))
    state_dir.change("UPDATE runs SET ledger_head = 'abc'")
    findings, _ = state_dir.verify()
    assert "the ledger ends with round 4, not with the entry abc" in findings[1]


def test_an_entry_rewritten_with_its_chain_is_found_by_the_arithmetic(state_dir: StateDir) -> None:
    """A weight that ledger and row agree on, but that doesn't make the model."""
    entry = state_dir.ask("SELECT entry FROM ledger WHERE round = 4")
    rewritten = entry.replace('"num_examples":13', '"num_examples":14')
    digest = entry_digest(rewritten.encode())
    state_dir.change("UPDATE ledger SET entry = ?, digest = ? WHERE round = 4", rewritten, digest)
    state_dir.change("UPDATE runs SET ledger_head = ?", digest)
    state_dir.change(
        "UPDATE updates SET num_examples = 14 WHERE order_id IN "
        "(SELECT order_id FROM orders WHERE round = 4 AND client_id = 1)"
    )
    expect_found(state_dir, ("round 4: aggregated again it gives model",))


def test_server_states_are_looked_at_and_made_again(tmp_path: Path) -> None:
    """Each one's bytes; a step whose state is damaged or let go isn't made again."""
    state_dir = write_state_dir(tmp_path, strategy="median+fedadam")
    whole = ALL_WHOLE.replace("5 models whole", "5 models whole, 4 server states whole")
    assert state_dir.verify() == ([], whole)

    def state_of(number: int) -> Path:
        digest = state_dir.ask("SELECT state_digest FROM rounds WHERE round = ?", number)
        return state_dir.folder / "models" / f"{digest}.server-state"

    state_of(1).unlink()
    flip_bit(state_of(2))
    summary = expect_found(state_dir, ("round 2: its server state holds other bytes",))
    assert "2 of 3 server states whole" in summary
    # Round 2 began with the first state, round 3 with the second.
    assert summary.endswith("2 of 4 re-aggregated (1 not kept, 1 damaged)")
    state_dir.change("UPDATE rounds SET state_digest = 'abc' WHERE round = 3")
    state_of(4).unlink()
    expect_found(
        state_dir,
        ("round 3: its server state is abc in the table of rounds",),
        ("round 2: its server state holds other bytes",),
        ("round 4: its server state is gone",),
    )


def test_rounds_of_compressed_updates_are_made_again(tmp_path: Path) -> None:
    """From the bytes that were sent, the encoding in the ledger and the run's settings."""
    state_dir = write_state_dir(tmp_path, compression="int8")
    assert state_dir.verify() == ([], ALL_WHOLE)


def test_a_server_state_that_cant_be_made_again_is_found(tmp_path: Path) -> None:
    """By the arithmetic: the entry and its chain agree on another state than the updates make."""
    state_dir = write_state_dir(tmp_path, strategy="fedavgm")
    entry = state_dir.ask("SELECT entry FROM ledger WHERE round = 4")
    state = state_dir.ask("SELECT state_digest FROM rounds WHERE round = 4")
    other = state_dir.ask("SELECT state_digest FROM rounds WHERE round = 3")
    rewritten = entry.replace(f'"state":"{state}"', f'"state":"{other}"')
    digest = entry_digest(rewritten.encode())
    state_dir.change("UPDATE ledger SET entry = ?, digest = ? WHERE round = 4", rewritten, digest)
    state_dir.change("UPDATE runs SET ledger_head = ?", digest)
    state_dir.change("UPDATE rounds SET state_digest = ? WHERE round = 4", other)
    expect_found(state_dir, ("round 4: aggregated again it gives server state",))


def test_what_was_let_go_is_no_finding_but_is_counted(state_dir: StateDir) -> None:
    """Old models and updates may be let go; the round whose base is gone can't be made again."""
    state_dir.path("models", round_number=1).unlink()
    state_dir.path("spool", client=0, round_number=4).unlink()
    assert state_dir.verify() == (
        [],
        "4 rounds: chain whole, rows whole, 4 models whole, 7 updates whole, 1 quarantined "
        "payload whole, 2 of 4 re-aggregated (2 not kept)",
    )


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (
            lambda state_dir: state_dir.path("models", round_number=NUM_ROUNDS),
            "round 4: its model is gone",
        ),
        (
            lambda state_dir: state_dir.path(
                "quarantine", client=BAD_CLIENT, round_number=BAD_ROUND
            ),
            "round 2: the quarantined update of client 2 is gone",
        ),
    ],
    ids=["the last model", "a quarantined payload"],
)
def test_what_nothing_lets_go_is_missed(
    state_dir: StateDir, lose: Callable[[StateDir], Path], words: str
) -> None:
    """The model that the run ends with, and what is in quarantine."""
    lose(state_dir).unlink()
    expect_found(state_dir, (words,))


def test_one_round_can_be_looked_at_by_itself(state_dir: StateDir) -> None:
    """Files and arithmetic of that round only; a round that isn't there is a sentence."""
    flip_bit(state_dir.path("spool", client=1, round_number=3))
    findings, summary = state_dir.verify(round_number=2)
    assert findings == []
    assert summary.endswith(
        "2 models whole, 2 updates whole, 1 quarantined payload whole, 1 of 1 re-aggregated"
    )
    assert len(state_dir.verify(round_number=3)[0]) == 1
    with pytest.raises(NotFound, match="round 9 isn't finished"):
        state_dir.verify(round_number=9)


def test_a_damaged_database_is_found(state_dir: StateDir) -> None:
    """An index with other bytes than its table, which the database itself finds."""
    page = int(state_dir.ask("SELECT rootpage FROM sqlite_master WHERE name = 'orders_by_round'"))
    page_bytes = int(state_dir.ask("PRAGMA page_size"))
    path = state_dir.folder / "federation.sqlite"
    content = bytearray(path.read_bytes())
    # An index's entries fill its page from the end: this is in the text of the first entry's run.
    content[page * page_bytes - 10] ^= 1
    path.write_bytes(content)
    findings, _ = state_dir.verify()
    assert "federation.sqlite can't be read" in findings[0]
    assert "orders_by_round" in findings[0]


def test_a_task_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """Said after everything that needs no task was looked at."""
    state_dir = write_state_dir(tmp_path, task="no_such_module:task")
    flip_bit(state_dir.path("spool", client=1, round_number=3))
    findings: list[str] = []
    store = Store(tmp_path / "federation.sqlite", read_only=True)
    with pytest.raises(InvalidInput, match="importing no_such_module failed"):
        verify(store, tmp_path, store.runs.all_runs(), round_number=None, tell=findings.append)
    store.close()
    assert len(findings) == 1

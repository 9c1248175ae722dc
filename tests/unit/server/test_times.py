"""Times are ISO 8601 in UTC; durations don't rest on the clock that somebody can set."""

import logging
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedrounds import cli
from fedrounds.times import iso_time, length_text
from fedserver.records import Attempt, Run
from fedserver.reporting.as_json import attempt_json
from fedserver.store import Store, read_history, run_clock
from tests.factories import begin_round, make_event, make_update, record_arrival

THREE_DAYS_S = 259_192.0


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give a list whose sum is how far the wall clock is set away from where it was."""
    set_by, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + sum(set_by))
    return set_by


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give a list whose sum is added to the seconds since the machine was started."""
    added, real = [0.0], run_clock.since_boot_s
    monkeypatch.setattr(run_clock, "since_boot_s", lambda: real() + sum(added))
    return added


def finish(store: Store, run: Run, opened: Attempt) -> dict[str, object]:
    """Let both clients answer, close and finish a round; returns its history."""
    for order in opened.orders:
        record_arrival(store, run, make_update(order.order_id))
    store.rounds.close_round(opened, make_event("round-closed"))
    events = [make_event("round-done")]
    store.rounds.finish_round(opened, model_digest="00" * 32, next_round=None, events=events)
    return attempt_json(read_history(store, run)[0])


def durations_of(entry: dict[str, object]) -> list[float]:
    """Return when the updates came, the close and the end, in seconds after the opening."""
    updates = entry["updates"]
    assert isinstance(updates, list)
    durations = [update["received_after_s"] for update in updates] + [
        entry["collected_s"],
        entry["took_s"],
    ]
    assert all(isinstance(duration, float) for duration in durations), durations
    return durations


def test_a_wall_clock_that_is_set_back_changes_no_duration(
    tmp_path: Path, wall_clock: list[float], machine: list[float]
) -> None:
    """The round took 100 s, though its end stands before its beginning in the wall clock's time."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store)
    wall_clock.append(-THREE_DAYS_S)
    machine.append(100.0)
    entry = finish(store, run, opened)
    store.close()
    assert str(entry["finished_at"]) < str(entry["started_at"])
    for duration in durations_of(entry):
        assert 100 <= duration < 100 + 60


def test_a_duration_goes_on_over_a_restart_of_the_server(
    tmp_path: Path, wall_clock: list[float], machine: list[float]
) -> None:
    """The clock of the machine goes on while no server runs."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store)
    store.close()
    wall_clock.append(-THREE_DAYS_S)
    machine.append(100.0)
    again = Store(tmp_path / "federation.sqlite")
    for duration in durations_of(finish(again, run, opened)):
        assert 100 <= duration < 100 + 60
    again.close()


@pytest.mark.parametrize(("set_by", "expected_s"), [(500.0, 500), (-THREE_DAYS_S, 0)])
def test_after_a_restart_of_the_machine_the_wall_clock_says_what_has_passed(
    tmp_path: Path,
    wall_clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    set_by: float,
    expected_s: float,
) -> None:
    """Nothing else knows how long it was off; where that clock was set back, nothing has passed."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store)
    monkeypatch.setattr(run_clock, "boot_id", lambda: "another start")
    monkeypatch.setattr(run_clock, "since_boot_s", lambda: 12.0)
    wall_clock.append(set_by)
    for duration in durations_of(finish(store, run, opened)):
        assert expected_s <= duration < expected_s + 60
    store.close()


def test_a_time_is_iso_8601_in_utc() -> None:
    """2026-11-30T07:52:20Z is 1796025140 s after the epoch: 20,787 days, 7 h 52 min 20 s."""
    at = 20_787 * 86_400 + 7 * 3_600 + 52 * 60 + 20.25
    assert iso_time(at) == "2026-11-30T07:52:20.250000+00:00"
    assert iso_time(at, timespec="seconds") == "2026-11-30T07:52:20+00:00"


def test_a_line_of_the_log_begins_with_such_a_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the machine is: the log, the history and the incidents can be laid side by side."""
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    try:
        cli.log_to_stderr("INFO")
        logging.getLogger("fedserver.test").info("hello")
        word, *rest = capsys.readouterr().err.split()
    finally:
        root.handlers[:], root.level = before
        monkeypatch.undo()
        time.tzset()
    assert rest == ["INFO", "hello"]
    at = datetime.fromisoformat(word)
    assert at.utcoffset() == timedelta(0)
    assert abs(at.timestamp() - time.time()) < 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.6, "8 s"), (200, "3 min 20 s"), (7_500, "2 h 5 min"), (97_200, "1 d 3 h"), (60, "1 min")],
)
def test_a_length_of_time_has_the_two_largest_units(seconds: float, text: str) -> None:
    assert length_text(seconds) == text

"""What a person reads: `show` describes a round, and no table cuts a word."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedrounds.diagnosis.as_json import diagnosis_fields
from fedrounds.diagnosis.values import Cause, Remedy, RemedyKind
from fedrounds.types import IncidentKind, LeaveReason
from fedserver.__main__ import main
from fedserver.events import event_of
from fedserver.phases import OrderEvent
from fedserver.records import Attempt, Event, ModelEvaluation
from fedserver.store import Store
from tests.factories import (
    begin_round,
    make_diagnosis,
    make_event,
    make_round,
    make_update,
    record_arrival,
)

REASON = (
    "tensor 'fc.weight' has shape [4, 4] and dtype torch.float32; the model has [3, 3] and "
    "torch.float32"
)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Give a run whose first round failed once and is done, and whose second collects.

    In the attempt that succeeded client 1 was refused, 2 stalled, 3 was late by a whole update.
    """
    store = Store(tmp_path / "federation.sqlite")
    run, failed = begin_round(store, clients=(0, 1))
    event = event_of(
        IncidentKind.ROUND_FAILED, failed, is_incident=True, reason="too few updates can still come"
    )
    store.rounds.fail_round(failed, [event])
    opened = make_round(run.run_id, attempt=2, clients=(0, 1, 2, 3))
    store.rounds.open_round(opened, make_event("round-opened", attempt=2))
    good, bad, stalled, late = (order.order_id for order in opened.orders)
    record_arrival(store, run, make_update(good, num_examples=123, metrics={"accuracy": 0.8125}))
    record_arrival(store, run, make_update(bad), OrderEvent.REFUSE, reason=REASON)
    store.orders.abandon_order(
        run.run_id, stalled, _incident(opened, 2, idle_s=61.2345), strikes=True
    )
    disk_low = event_of(IncidentKind.DISK_LOW, opened, is_incident=True, free_bytes=1_000_000)
    store.events.add_events(run.run_id, [disk_low])
    store.rounds.close_round(opened, event_of("round-closed", opened))
    record_arrival(store, run, make_update(late), OrderEvent.MISS)
    following = make_round(run.run_id, round_number=2, clients=(0, 3), base_digest="ee" * 32)
    store.rounds.finish_round(
        opened,
        model_digest="ee" * 32,
        next_round=following,
        events=[event_of("round-done", opened), event_of("round-opened", following)],
    )
    evaluation = ModelEvaluation(accuracy=0.75, loss=0.5)
    store.rounds.record_evaluation(opened, evaluation, event_of("evaluated", opened))
    store.close()
    return tmp_path


def _incident(of: Attempt, client_id: int, *, idle_s: float) -> Event:
    return event_of(
        IncidentKind.CLIENT_STALLED, of, client_id=client_id, is_incident=True, idle_s=idle_s
    )


def shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    state_dir: Path,
    *flags: str,
    width: int = 80,
) -> str:
    """Return what a command prints into a pipe of that width; no word of it is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--state-dir", str(state_dir), *flags]) == 0
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    return printed


def test_show_tells_a_round_with_its_attempts_and_incidents(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who delivered and who didn't and why, in words; also what concerned the whole server."""
    printed = shown(capsys, monkeypatch, "show", state_dir, "--round", "1")
    assert max(map(len, printed.splitlines())) <= 80
    words = " ".join(printed.split())
    for phrase in (
        "round 1 of 3: done",
        "Attempt 1: failed",
        "the attempt failed: too few updates can still come",
        "Attempt 2: done",
        "1 of 4 updates counted",
        "0 counted 123 0.8125",
        f"client 1 refused: {REASON}",
        "client 2 abandoned: it got no further and was given up (idle 61.23 s); sits out until "
        "round 3",
        "client 2: it got no further and was given up",
        "the disk is nearly full: no round opens (free 1000000 bytes)",
        "accuracy 0.7500",
        "model eeeeeeeeeeee",
        "Sitting out at this moment client 1 until round 3: tensor",
        "client 2 until round 3: it got no further and was given up",
        "In the ledger with an entry of digest",
    ):
        assert phrase in words, phrase
    # How late it is depends on the machine's pace.
    assert re.search(r"client 3 late: it came \d+\.\d\d s after the close", words)
    assert words.count(REASON) == 2, "beside the verdict and in the suspension, not once more"


def test_history_tells_each_incident_in_words(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which round, who, what and why, the reason of a refusal too."""
    store = Store(state_dir / "federation.sqlite")
    run = store.runs.latest_run()
    assert run is not None
    refused = event_of(
        *(IncidentKind.UPDATE_REFUSED, store.rounds.latest_attempt(run.run_id)),
        client_id=1,
        is_incident=True,
        reason=REASON,
    )
    early = event_of(
        IncidentKind.CLIENT_LEFT, client_id=4, is_incident=True, reason=LeaveReason.TASK_FAILED
    )
    store.events.add_events(run.run_id, [refused, early])
    store.close()
    words = " ".join(shown(capsys, monkeypatch, "history", state_dir, width=120).split())
    for phrase in (
        "round 1: the attempt failed: too few updates can still come",
        f"round 2: client 1: its update was refused: {REASON}",
        "round 1: client 2: it got no further and was given up (idle 61.23 s)",
        "round 1: client 4: it left the run: the task's own code failed; its own log says how",
    ):
        assert phrase in words, phrase


@pytest.fixture
def diagnosed(state_dir: Path) -> Path:
    """Give the same run, in whose second round clients 3 and 0 had something to report."""
    store = Store(state_dir / "federation.sqlite")
    run = store.runs.latest_run()
    assert run is not None
    current = store.rounds.latest_attempt(run.run_id)
    stopped = make_diagnosis(cause=Cause.LEARNING_RATE, remedy=Remedy(kind=RemedyKind.NONE))
    for client_id, diagnosis in ((3, make_diagnosis()), (0, stopped)):
        event = event_of(
            *(IncidentKind.TRAINING_DIAGNOSED, current),
            **{"step": 17, **diagnosis_fields(diagnosis)},
            client_id=client_id,
            is_incident=True,
        )
        store.events.add_events(run.run_id, [event])
    store.close()
    return state_dir


CURED = "client 3: bad-data at step 17 (2 samples with NaN in the input): dropped, training went on"


def test_show_tells_a_diagnosis_with_its_evidence(
    diagnosed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict in a sentence, the place, the experiments and the trend as tables."""
    printed = shown(capsys, monkeypatch, "show", diagnosed)
    assert max(map(len, printed.splitlines())) <= 80
    words = " ".join(printed.split())
    for phrase in (
        CURED,
        "client 0: learning-rate at step 17",
        "training stopped, no update",
        "where forward pass, module 1, operation native_batch_norm, tensor 1.weight",
        "samples number 40 (NaN in the input, 3)",
        "heals it too a lower rate",
        "without the suspects goes well 0.75",
        "17 bad nan inf 2.5 0.05",
    ):
        assert phrase in words, phrase
    assert CURED[len("client 3: ") :] in " ".join(
        shown(capsys, monkeypatch, "history", diagnosed).split()
    )


def test_show_gives_a_round_as_json(
    diagnosed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history's objects of the round's attempts, diagnoses whole; nothing but JSON."""
    report = json.loads(shown(capsys, monkeypatch, "show", diagnosed, "--json"))
    assert (report["round"], report["entry_digest"]) == (2, None)
    (attempt,) = report["attempts"]
    kept = [
        incident for incident in attempt["incidents"] if incident["kind"] == "training-diagnosed"
    ]
    assert [incident["client"] for incident in kept] == [3, 0]
    assert kept[0]["diagnosis"]["trend"][1]["grad_norm"] == "inf"
    before = json.loads(shown(capsys, monkeypatch, "show", diagnosed, "--json", "--round", "1"))
    assert [attempt["phase"] for attempt in before["attempts"]] == ["FAILED", "DONE"]
    assert len(before["entry_digest"]) == 64


def test_a_diagnosis_is_drawn(
    diagnosed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last diagnosis, or a client's; where there is none, a sentence says which there are."""
    pictures = []
    for flags in ([], ["--client", "3"]):
        out = diagnosed / "diagnosis.png"
        shown(capsys, monkeypatch, "show", diagnosed, "--diagnosis-out", str(out), *flags)
        pictures.append(out.read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    assert pictures[0] != pictures[1]
    at = ["--state-dir", str(diagnosed), "--diagnosis-out", str(diagnosed / "no.png")]
    assert main(["show", *at, "--client", "1"]) == 1
    assert "clients with one: 0, 3" in capsys.readouterr().err
    assert main(["show", *at[:-1], str(diagnosed / "no" / "where.png")]) == 1
    assert "choose --diagnosis-out" in capsys.readouterr().err


def test_show_tells_the_round_that_goes_on(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest by default, without what isn't there yet. A missing round is an error."""
    words = " ".join(shown(capsys, monkeypatch, "show", state_dir).split())
    assert "round 2 of 3: collecting" in words
    assert "base model eeeeeeeeeeee (of round 1)" in words
    assert "0 of 2 updates stored" in words
    assert "0 open" in words
    assert "finished" not in words
    assert "ledger" not in words
    assert main(["show", "--state-dir", str(state_dir), "--round", "9"]) == 1
    assert "has no round 9; its latest is round 2" in capsys.readouterr().err


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_tables_leave_columns_out_and_cut_no_word(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """At 80 columns the history is all there; narrower it names what it leaves out."""
    printed = shown(capsys, monkeypatch, "history", state_dir, width=width)
    table, _, _ = printed.partition("\n20")
    assert max(map(len, table.splitlines())) <= width
    words = table.split()
    assert {"round", "phase", "failed", "done", "collecting"} <= set(words)
    left_out = words[words.index("for:") + 1 :] if "for:" in words else []
    assert (left_out == []) == (width >= 80)
    headings = ["round", "phase", "counted", "accuracy", "loss", "incidents", "seconds", "model"]
    assert all(heading in words or f"{heading}," in words for heading in headings)
    shown(capsys, monkeypatch, "show", state_dir, "--round", "1", width=width)


def test_the_history_can_be_that_of_the_last_rounds_alone(
    capsys: pytest.CaptureFixture[str], state_dir: Path
) -> None:
    """Rounds, not attempts; more than there are is all of them."""
    every = history_json(capsys, state_dir)
    numbers = sorted({attempt["round"] for attempt in every})
    assert len(numbers) > 1
    last = history_json(capsys, state_dir, "--last", "1")
    assert last == [attempt for attempt in every if attempt["round"] == numbers[-1]]
    assert history_json(capsys, state_dir, "--last", "1000") == every


def history_json(
    capsys: pytest.CaptureFixture[str], state_dir: Path, *flags: str
) -> list[dict[str, Any]]:
    """Return what `history --json` prints."""
    assert main(["history", "--json", "--state-dir", str(state_dir), *flags]) == 0
    rounds = json.loads(capsys.readouterr().out)
    assert isinstance(rounds, list)
    return rounds


def test_a_client_that_is_not_in_the_run_is_an_error(
    capsys: pytest.CaptureFixture[str], state_dir: Path
) -> None:
    """With a picture wanted or not."""
    assert main(["show", "--client", "0", "--state-dir", str(state_dir)]) == 0
    capsys.readouterr()
    assert main(["show", "--client", "777", "--state-dir", str(state_dir)]) == 1
    assert "has no client 777" in capsys.readouterr().err

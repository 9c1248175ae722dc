"""How good a model is on each client: the numbers, and what a person sees of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import AUROC, Accuracy

from fedrounds.training.metrics import MetricFactory
from fedrounds.types import ClientUpdate
from fedserver.__main__ import main
from fedserver.clients.sampling import cohort_seed
from fedserver.history import attempts_that_asked
from fedserver.models.client_metrics import (
    client_evaluation_events,
    summarise_clients,
)
from fedserver.records import ModelEvaluation, Run
from fedserver.reporting.client_report import client_evaluation_text, client_table, draw_clients
from fedserver.reporting.tables import draw_curve
from fedserver.store import Store, read_history
from fedserver.store.rows import read_client_evaluation
from tests.factories import make_event, make_round, make_update, record_arrival

shares = st.floats(0, 1)


def measured_update(
    accuracy: float, *, measured: int = 50, loss: float | None = 1.0
) -> ClientUpdate:
    """Return the update of a client that has measured the base."""
    losses = {} if loss is None else {"global_loss": loss}
    return make_update(
        num_examples=4 * measured,
        metrics={"global_accuracy": accuracy, "global_examples": measured, **losses},
    )


@given(
    st.lists(st.tuples(shares, st.integers(1, 1000), st.floats(0, 100)), min_size=1, max_size=60)
)
def test_a_summary_is_numpys(clients: Sequence[tuple[float, int, float]]) -> None:
    """Means by the examples that were measured, not by those trained on; the rest by client."""
    accuracies, sizes, losses = ([client[column] for client in clients] for column in range(3))
    summary = summarise_clients(
        [measured_update(a, measured=n, loss=e) for a, n, e in clients], holdout=0.2
    )
    low, middle, high = np.percentile(accuracies, (25, 50, 75))
    expected = {
        "accuracy": np.average(accuracies, weights=sizes),
        "loss": np.average(losses, weights=sizes),
        "mean": np.mean(accuracies),
        "worst_decile": np.sort(accuracies)[: max(1, len(accuracies) // 10)].mean(),
        "std": np.std(accuracies),
        "minimum": np.min(accuracies),
        "quartile_1": low,
        "median": middle,
        "quartile_3": high,
        "maximum": np.max(accuracies),
        "num_clients": len(clients),
        "num_examples": sum(sizes),
        "holdout": 0.2,
    }
    assert summary is not None
    assert summary.as_json() == pytest.approx(expected, abs=1e-9)


def test_a_summary_by_hand() -> None:
    """A client of 300 examples at 0.9 and one of 100 at 0.1: 0.7 in one heap, 0.5 by client."""
    updates = [measured_update(0.9, measured=300, loss=None), measured_update(0.1, measured=100)]
    summary = summarise_clients(updates, holdout=0.0)
    assert summary is not None
    assert summary.accuracy == pytest.approx(0.7)
    assert summary.mean == pytest.approx(0.5)
    assert summary.std == pytest.approx(0.4)
    assert summary.worst_decile == 0.1
    assert summary.loss is None, "one client's loss was beyond all numbers"
    assert summarise_clients([make_update()], holdout=0.0) is None
    assert client_evaluation_events(make_round(), None) == []


def test_clients_without_an_accuracy_are_compared_by_their_loss() -> None:
    """A regression: losses 1, 2 and 9, the last of a client of 100 examples among 400 and 500."""
    updates = [
        replace(
            make_update(),
            metrics={"global_loss": loss, "global_examples": float(size)},
            measurements={"mae": (0.5 + number,)},
        )
        for number, (loss, size) in enumerate(((1.0, 400), (9.0, 100), (2.0, 500)))
    ]
    metrics: dict[str, MetricFactory] = {"mae": lambda: AUROC("binary")}
    summary = summarise_clients(updates, holdout=0.2, metrics=metrics)
    assert summary is not None
    assert summary.accuracy is None
    assert summary.spread_of == "loss"
    assert summary.loss == pytest.approx((400 + 900 + 1000) / 1000)
    assert (summary.mean, summary.median, summary.worst_decile) == (4.0, 2.0, 9.0)
    assert summary.metrics == {"mae": pytest.approx(1.5)}
    stored = json.loads(json.dumps(summary.as_json()))
    assert "accuracy" not in stored
    assert read_client_evaluation(stored) == summary
    text = client_evaluation_text(summary)
    assert text.startswith("loss: mean 4.0000, worst tenth 9.0000, standard deviation")
    (event,) = client_evaluation_events(make_round(), summary)
    assert event.fields["spread_of"] == "loss"


def test_metrics_of_the_tasks_own_are_pooled_or_means() -> None:
    """Clients with 3 of 4 and 0 of 1 right: 3/5. AUC 0.5 and 1: in the mean 0.75."""
    metrics: dict[str, MetricFactory] = {
        "share": lambda: Accuracy("multiclass", num_classes=2),
        "auc": lambda: AUROC("binary"),
    }
    reports = [
        {"share/tp": (3.0,), "share/fp": (1.0,), "share/fn": (1.0,), "share/tn": (0.0,)},
        {"share/tp": (0.0,), "share/fp": (1.0,), "share/fn": (1.0,), "share/tn": (0.0,)},
    ]
    updates = [
        replace(measured_update(0.5), measurements=report | {"auc": (auc,)})
        for report, auc in zip(reports, (0.5, 1.0), strict=True)
    ]
    summary = summarise_clients(updates, holdout=0.2, metrics=metrics)
    assert summary is not None
    assert summary.metrics == {"share": pytest.approx(3 / 5), "auc": 0.75}
    assert read_client_evaluation(json.loads(json.dumps(summary.as_json()))) == summary
    assert "share 0.6000, auc 0.7500 as mean over clients (on 20%" in client_evaluation_text(
        summary
    )


MODELS = ("11" * 32, "22" * 32, "33" * 32)
ACCURACIES = ((0.1, 0.12, 0.08), (0.9, 0.25, 0.5))
"""What clients 0, 1 and 2 say in round 1 of the first model, in round 2 of that of round 1."""


def play(store: Store, run: Run, number: int) -> None:
    """Play a round in which three clients say how good its base is, and train on 80 examples."""
    opened = make_round(
        run.run_id, round_number=number, clients=(0, 1, 2), base_digest=MODELS[number - 1]
    )
    store.rounds.open_round(opened, make_event("round-opened", round_number=number))
    updates = []
    for order, accuracy in zip(opened.orders, ACCURACIES[number - 1], strict=True):
        measured = measured_update(accuracy, measured=20, loss=2 - accuracy)
        update = replace(
            measured,
            order_id=order.order_id,
            digest=order.order_id,
            metrics={**measured.metrics, "accuracy": 0.5, "personal_accuracy": (1 + accuracy) / 2},
        )
        record_arrival(store, run, update)
        updates.append(update)
    store.rounds.close_round(opened, make_event("round-closed", round_number=number))
    summary = summarise_clients(updates, holdout=0.2)
    events = [
        *client_evaluation_events(opened, summary),
        make_event("round-done", round_number=number),
    ]
    store.rounds.finish_round(
        opened,
        model_digest=MODELS[number],
        next_round=None,
        client_evaluation=summary,
        events=events,
    )
    evaluation = ModelEvaluation(accuracy=0.6, loss=1.25)
    store.rounds.record_evaluation(opened, evaluation, make_event("evaluated", round_number=number))


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Give a run of two rounds, both done."""
    store = Store(tmp_path / "federation.sqlite")
    run = store.runs.begin_run(
        {"rounds": 2, "seed": 7, "clients_per_round": 3, "cohort": "power-of-choice"}
    )
    for number in (1, 2):
        play(store, run, number)
    store.close()
    return tmp_path


def shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    state_dir: Path,
    command: str,
    *flags: object,
    width: int = 80,
) -> list[list[str]]:
    """Return the words of each line that a command prints, none of them cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--state-dir", str(state_dir), *map(str, flags)]) == 0
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    assert max(map(len, printed.splitlines())) <= width
    return [line.split() for line in printed.splitlines()]


SPREAD = (
    "mean 0.5500, worst tenth 0.2500, standard deviation 0.2677, quartiles 0.3750 to 0.7000 "
    "(on 20% of each one's examples, held out)"
)
"""0.9, 0.25 and 0.5: deviations of 0.35, -0.3 and -0.05; quartiles midway to the middle one."""


def test_clients_are_shown_the_worst_first(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last model that anybody was asked about is that of round 1; round 0 is the start."""
    lines = shown(capsys, monkeypatch, state_dir, "clients")
    assert ["1", "0.2500", "1.7500", "20", "80"] in lines
    rows = [line[0] for line in lines if len(line) == 5 and line[0].isdecimal()]
    assert rows == ["1", "2", "0"]
    assert SPREAD in " ".join(chain.from_iterable(lines))
    lines = shown(capsys, monkeypatch, state_dir, "clients", "--round", 0)
    assert ["2", "0.0800", "1.9200", "20", "80"] in lines
    assert main(["clients", "--state-dir", str(state_dir), "--round", "2"]) == 1
    refused = capsys.readouterr().err
    assert "no client has evaluated the model of round 2" in refused
    assert "rounds that clients have evaluated: 0 to 1 (" in refused


def test_the_history_has_mean_worst_tenth_and_deviation_beside_the_model(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of round 1 what was said in round 2; of the last model nobody was asked."""
    lines = shown(capsys, monkeypatch, state_dir, "history", width=120)
    assert next(line[:8] for line in lines if line[:1] == ["round"]) == [
        "round",
        "phase",
        "counted",
        "accuracy",
        "loss",
        "clients",
        "worst",
        "std",
    ]
    first, last = (next(line for line in lines if line[:1] == [number]) for number in "12")
    assert first[5:10] == ["0.6000", "1.2500", "0.5500", "0.2500", "0.2677"]
    assert last[5:7] == ["0.6000", "1.2500"]
    assert last[7:9] == [last[-2], MODELS[2][:8]]


def test_show_has_each_client_before_and_while_it_trained(
    state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's spread and each client's number, in words and as JSON."""
    for width in (80, 120):
        lines = shown(capsys, monkeypatch, state_dir, "show", "--round", 2, width=width)
        assert SPREAD in " ".join(chain.from_iterable(lines))
        (heading,) = [line for line in lines if line[:2] == ["client", "verdict"]]
        assert heading[2:6] == ["examples", "base", "personal", "training"]
        assert ["1", "counted", "80", "0.2500", "0.6250", "0.5000"] in lines
        seed = cohort_seed(7, round_number=2, attempt=1)
        how = f"cohort 3 clients, power-of-choice, drawn with seed {seed}"
        assert how in " ".join(chain.from_iterable(lines))
    assert main(["show", "--state-dir", str(state_dir), "--round", "2", "--json"]) == 0
    (attempt,) = json.loads(capsys.readouterr().out)["attempts"]
    assert attempt["client_evaluation"]["worst_decile"] == 0.25
    assert [update["metrics"]["global_accuracy"] for update in attempt["updates"]] == [
        0.9,
        0.25,
        0.5,
    ]


@pytest.mark.parametrize("command", ["clients", "curve"])
def test_a_picture_that_cant_be_written_gets_a_sentence(
    state_dir: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for path, reason in ((Path("/dev/full"), "No space left on device"), (state_dir, "directory")):
        argv = [command, "--out", str(path), "--state-dir", str(state_dir)]
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert f"can't draw into {path}" in error
        assert reason in error
        assert "Errno" not in error


def test_the_picture_of_the_clients_and_the_curve_are_pngs(state_dir: Path) -> None:
    """Drawn from the history alone; a model that was taken back has no measurements."""
    store = Store(state_dir / "federation.sqlite", read_only=True)
    run = store.runs.latest_run()
    assert run is not None
    history = read_history(store, run)
    store.close()
    asked = attempts_that_asked(history)
    assert {number: attempt.round_number for number, attempt in asked.items()} == {0: 1, 1: 2}
    for path in (state_dir / "clients.png", state_dir / "curve.png"):
        if path.stem == "curve":
            draw_curve(history, path)
        else:
            draw_clients(asked[1], path, title="clients")
        assert path.read_bytes().startswith(b"\x89PNG")
    late = [replace(update, staleness=int(update.client_id == 1)) for update in asked[1].updates]
    table = client_table(replace(asked[1], updates=late), title="clients", max_width=80)
    assert table.row_count == 2, "a stale update tells of an earlier model"
    other = [history[0], replace(history[1], base_digest="44" * 32)]
    assert set(attempts_that_asked(other)) == {0}

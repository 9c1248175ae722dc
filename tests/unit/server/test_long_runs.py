"""Commands that look at a run: what they read of it doesn't grow with the number of its rounds."""

from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from fedserver.__main__ import main
from fedserver.records import ClientEvaluation, ModelEvaluation
from fedserver.store import Store
from tests.factories import begin_round, make_event, make_round, make_update, record_arrival

ABOUT_CLIENTS = ClientEvaluation(
    accuracy=0.5,
    mean=0.5,
    worst_decile=0.5,
    std=0.0,
    minimum=0.5,
    quartile_1=0.5,
    median=0.5,
    quartile_3=0.5,
    maximum=0.5,
    num_clients=2.0,
    num_examples=20.0,
    holdout=0.0,
    loss=1.0,
)
LOOKING = {
    "confusion": ["--round", "2"],
    "clients": ["--round", "2"],
    "curve": ["--out", "{folder}/curve.png"],
    "export": ["--best", "--out", "{folder}/best.safetensors"],
    "show": ["--round", "2"],
}


def make_run(folder: Path, *, num_rounds: int) -> None:
    """Record a run whose rounds are done, evaluated, and asked about by their clients.

    Round 2 has the best model, whose file is there.
    """
    store = Store(folder / "federation.sqlite")
    run, opened = begin_round(store)
    for number in range(1, num_rounds + 1):
        for order in opened.orders:
            metrics = {"accuracy": 0.5, "loss": 1.25, "global_accuracy": 0.5, "global_loss": 1.0}
            record_arrival(store, run, make_update(order.order_id, metrics=metrics))
        store.rounds.close_round(opened, make_event("round-closed", round_number=number))
        digest = f"{number:064x}"
        following = None
        events = [make_event("round-done", round_number=number)]
        if number < num_rounds:
            following = make_round(run.run_id, round_number=number + 1, base_digest=digest)
            events.append(make_event("round-opened", round_number=number + 1))
        store.rounds.finish_round(
            opened,
            model_digest=digest,
            client_evaluation=ABOUT_CLIENTS,
            next_round=following,
            events=events,
        )
        evaluation = ModelEvaluation(
            accuracy=0.75 if number == 2 else 0.5,
            loss=1.0,
            class_accuracy=[0.5, 0.5],
            confusion=[[number, 1, 0], [1, number, 0]],
        )
        store.rounds.record_evaluation(
            opened, evaluation, make_event("evaluated", round_number=number)
        )
        if following is not None:
            opened = following
    store.close()
    (folder / "models").mkdir()
    (folder / "models" / f"{2:064x}.safetensors").write_bytes(b"model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give the state-dirs of a short and of a longer run."""
    made = []
    for num_rounds in (4, 12):
        made.append(tmp_path_factory.mktemp("server"))
        make_run(made[-1], num_rounds=num_rounds)
    return made


@pytest.mark.parametrize("command", LOOKING)
def test_a_command_asks_the_database_as_often_in_a_long_run(
    folders: list[Path], command: str
) -> None:
    """Three times as many rounds, the same number of queries."""
    counts: list[int] = []

    def count(*_: object) -> None:
        counts[-1] += 1

    event.listen(Engine, "before_cursor_execute", count)
    try:
        for folder in folders:
            counts.append(0)
            words = [word.format(folder=folder) for word in LOOKING[command]]
            assert main([command, *words, "--state-dir", str(folder)]) == 0
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert counts[0] == counts[1] > 0


def test_the_answers_are_of_the_round_that_was_asked_for(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The best model is that of round 2, and without --round the last round is shown."""
    folder = folders[1]
    out = folder / "best"
    argv = ["export", "--best", "--out", str(out), "--state-dir", str(folder)]
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("round 2: ")
    assert out.read_bytes() == b"model"
    for command, words in (("confusion", "round 12"), ("clients", "model of round 11")):
        assert main([command, "--state-dir", str(folder)]) == 0
        assert words in capsys.readouterr().out
    assert main(["confusion", "--round", "13", "--state-dir", str(folder)]) == 1
    assert "rounds with one: 1 to 12" in capsys.readouterr().err

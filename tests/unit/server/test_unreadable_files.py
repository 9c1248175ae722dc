"""A file that can't be read or written is a sentence in every command that looks at a run."""

from pathlib import Path

import pytest

from fedserver.__main__ import main
from fedserver.store import Store
from tests.factories import begin_round, make_event, make_update, record_arrival

LOOKING = {
    "history": [],
    "show": [],
    "curve": [],
    "confusion": [],
    "clients": [],
    "export": ["--out", "model.safetensors"],
    "quarantine": [],
    "verify": [],
}


def words_of(command: str) -> list[str]:
    """Return a command as it is typed, with what it requires."""
    return [command, *(["list"] if command == "quarantine" else []), *LOOKING[command]]


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Give the state-dir of a run with one round that is done, without an evaluation."""
    folder = tmp_path / "server"
    (folder / "models").mkdir(parents=True)
    store = Store(folder / "federation.sqlite")
    run, opened = begin_round(store)
    for order in opened.orders:
        record_arrival(store, run, make_update(order.order_id))
    store.rounds.close_round(opened, make_event("round-closed"))
    events = [make_event("round-done")]
    store.rounds.finish_round(opened, model_digest="00" * 32, next_round=None, events=events)
    store.close()
    return folder


def expect_sentence(capsys: pytest.CaptureFixture[str], argv: list[str], name: str) -> None:
    """Run a command that must fail with one line that names the file, and no traceback."""
    try:
        code = main(argv)
    except SystemExit as ended:
        code = int(str(ended.code))
    shown = capsys.readouterr()
    assert code != 0
    # `verify` prints what is damaged to standard output: that is its result.
    lines = (shown.err or shown.out).strip().splitlines()
    assert len(lines) == 1, lines
    assert name in lines[0]


@pytest.mark.parametrize("command", LOOKING)
def test_a_state_dir_that_is_missing_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for name in ("missing", "file"):
        expect_sentence(capsys, [*words_of(command), "--state-dir", str(tmp_path / name)], name)


@pytest.mark.parametrize("command", LOOKING)
def test_a_database_that_is_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "federation.sqlite").mkdir()
    expect_sentence(capsys, [*words_of(command), "--state-dir", str(tmp_path)], "federation.sqlite")


@pytest.mark.parametrize("command", ["", *LOOKING])
def test_a_settings_file_that_is_missing_a_folder_or_no_toml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """The server itself too."""
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    words = words_of(command) if command else []
    for name in ("missing.toml", "folder.toml", "bytes.toml"):
        expect_sentence(capsys, [*words, "--config", str(tmp_path / name)], name)


def test_a_model_that_cant_be_read(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is gone, or something else stands in its place."""
    model = state_dir / "models" / f"{'00' * 32}.safetensors"
    argv = ["export", "--out", str(state_dir / "out"), "--state-dir", str(state_dir)]
    expect_sentence(capsys, argv, model.name)
    model.mkdir()
    expect_sentence(capsys, argv, model.name)


def test_a_model_that_cant_be_written(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state_dir / "models" / f"{'00' * 32}.safetensors").write_bytes(b"model")
    (state_dir / "folder").mkdir()
    for name in ("folder", "missing/model.safetensors"):
        argv = ["export", "--out", str(state_dir / name), "--state-dir", str(state_dir)]
        expect_sentence(capsys, argv, name)


def test_a_curve_that_has_nothing_to_draw_says_why(
    state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["curve", "--out", str(state_dir / "curve.png"), "--state-dir", str(state_dir)]
    expect_sentence(capsys, argv, "no round that is done has an evaluation")
    assert not (state_dir / "curve.png").exists()

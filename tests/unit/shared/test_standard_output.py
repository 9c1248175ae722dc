"""Output that can't be written: a sentence and exit code 1, at the end of Python too."""

import io
import os
import sys
from pathlib import Path

import pytest

from fedrounds.standard_output import run_program


@pytest.mark.parametrize("size", [1, 100_000], ids=["in the buffer", "beyond the buffer"])
@pytest.mark.parametrize("ends_by_exit", [False, True])
def test_a_full_disk_is_reported_once(
    size: int,
    ends_by_exit: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A small output stays in the buffer until the end, where Python would write a traceback."""

    def main(_: list[str]) -> int:
        print("x" * size)
        if ends_by_exit:
            raise SystemExit(0)
        return 0

    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        assert run_program("fedserver", main) == 1
        sys.stdout.close()  # as Python does at its end
    assert capsys.readouterr().err == (
        "fedserver: the output can't be written (No space left on device); send it elsewhere\n"
    )


def test_a_reader_that_has_gone_is_no_news(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run_program("fedserver", lambda _: print("x") or 0) == 1
        sys.stdout.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_buffered", [True, False])
def test_what_is_printed_arrives(
    is_buffered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a buffer, as with PYTHONUNBUFFERED, it is there at once."""
    path = tmp_path / "out"
    seen = []

    def main(_: list[str]) -> int:
        print("\u20ac")
        seen.append(path.read_text("utf-8"))
        return 7

    with io.FileIO(path, "w") as file:
        stream = io.TextIOWrapper(
            io.BufferedWriter(file) if is_buffered else file,
            encoding="utf-8",
            write_through=not is_buffered,
        )
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_program("fedserver", main) == 7
    assert seen == ["" if is_buffered else "\u20ac\n"]
    assert path.read_text("utf-8") == "\u20ac\n"

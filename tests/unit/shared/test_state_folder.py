"""Who may look into a state-dir: the user whose process it is."""

import os
import stat
from pathlib import Path

import pytest

from fedrounds.files import locked_folder


def mode_of(path: Path) -> int:
    """Return who may do what with it."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_its_users_alone(tmp_path: Path) -> None:
    """The folders above it, and what is written elsewhere, have the usual mode."""
    before = os.umask(0o022)
    try:
        with locked_folder(tmp_path / "state" / "server") as folder:
            assert mode_of(folder) == 0o700
        assert mode_of(tmp_path / "state") == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mode", "after"), [(0o755, 0o700), (0o701, 0o700), (0o2777, 0o700)])
def test_a_folder_that_everybody_may_look_into_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, after: int
) -> None:
    """As older versions left it; it is said, once."""
    tmp_path.chmod(mode)
    for _ in range(2):
        with locked_folder(tmp_path):
            assert mode_of(tmp_path) == after
    (line,) = caplog.messages
    assert f"the state-dir {tmp_path}: only you can now" in line


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770])
def test_a_folder_that_is_shared_with_a_group_stays_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    """Nobody gives a group what others don't get by accident."""
    tmp_path.chmod(mode)
    with locked_folder(tmp_path):
        assert mode_of(tmp_path) == mode
    assert caplog.messages == []


@pytest.mark.parametrize("whose", ["everybody's", "somebody else's", "of no mode"])
def test_a_folder_that_cant_be_closed_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """As /tmp; of another user; on a file system that knows no modes."""
    mode = 0o1777 if whose == "everybody's" else 0o755
    tmp_path.chmod(mode)
    if whose == "somebody else's":
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    if whose == "of no mode":

        def refuse(_: Path, __: int) -> None:
            raise PermissionError

        monkeypatch.setattr(Path, "chmod", refuse)
    with locked_folder(tmp_path):
        assert mode_of(tmp_path) == mode
    assert "use a folder of your own" in caplog.text

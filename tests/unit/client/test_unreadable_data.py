"""Whatever is in the way of a client's files is one sentence that names the file."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedclient.__main__ import main

TABLE = "tabular,label=y,features=a,classes=2"
RAW = "MNIST/raw/train-images-idx3-ubyte"
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2

# What stands under the folder `data`, and the file or folder that the sentence must name.
Obstacle = tuple[str, Callable[[Path], None], str]


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """Return what writes a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def file_at_root(folder: Path) -> None:
    """Write a file in the folder's place."""
    folder.write_bytes(b"")


def folder_at(name: str) -> Callable[[Path], None]:
    """Return what makes a folder."""
    return lambda folder: (folder / name).mkdir(parents=True)


def link_at(name: str) -> Callable[[Path], None]:
    """Return what makes a link to a file that isn't there."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to("nowhere")

    return make


def with_labels(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what makes the images' labels too, so that nothing is downloaded."""

    def make_both(folder: Path) -> None:
        make(folder)
        written("MNIST/raw/train-labels-idx1-ubyte", b"")(folder)

    return make_both


def closed(name: str, make: Callable[[Path], None], mode: int = 0) -> Callable[[Path], None]:
    """Return what makes something and takes the rights to a part of it away."""

    def make_and_close(folder: Path) -> None:
        make(folder)
        (folder / name).chmod(mode)

    return make_and_close


ROWS = written("in/x.csv", b"a,y\n1,0\n")
TEXT = written("in/x.txt", b"abc" * 99)
IMAGES = with_labels(written(RAW, b""))
OBSTACLES: dict[str, Obstacle] = {
    "missing table": (TABLE, lambda _: None, "data"),
    "file for a folder of tables": (TABLE, file_at_root, "data"),
    "no table": (TABLE, folder_at("empty"), "data"),
    "bytes in a table": (TABLE, written("x.csv", b"\xff\xfe\x00"), "x.csv"),
    "empty table": (TABLE, written("x.csv", b""), "x.csv"),
    "short row": (TABLE, written("x.csv", b"a,y\n1\n"), "x.csv"),
    "broken link to a table": (TABLE, link_at("x.csv"), "x.csv"),
    "closed table": (TABLE, closed("in/x.csv", ROWS), "x.csv"),
    "closed folder of tables": (TABLE, closed("in", ROWS), "data/in"),
    "folder of tables that can't be entered": (TABLE, closed("in", ROWS, 0o444), "in/x.csv"),
    "missing text": ("text", lambda _: None, "data"),
    "bytes in a text": ("text", written("x.txt", b"\xff\xfe\x00"), "x.txt"),
    "folder for a text": ("text", folder_at("x.txt"), "data"),
    "closed text": ("text", closed("in/x.txt", TEXT), "x.txt"),
    "closed folder of texts": ("text", closed("in", TEXT), "data/in"),
    "damaged image file": ("mnist", with_labels(written(f"{RAW}.gz", b"none")), RAW),
    "folder for an image file": ("mnist", with_labels(folder_at(RAW)), RAW),
    "closed image file": ("mnist", closed(RAW, IMAGES), RAW),
    "closed folder of images": ("mnist", closed("MNIST", IMAGES), "MNIST"),
}


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (
        *(("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32)),
        ("inheritable", ctypes.c_uint32),
    )


@pytest.fixture
def as_ordinary_user() -> Iterator[None]:
    """Take away from this thread what lets a superuser read every file (capabilities(7), Linux).

    Another user's id won't do: that user may not read Python's own modules.
    """
    if os.geteuid() != 0:
        yield
        return
    system = ctypes.CDLL(None, use_errno=True)
    header, held = _Header(0x20080522, 0), (_Capabilities * 2)()
    assert system.capget(ctypes.byref(header), held) == 0
    before = held[0].effective
    held[0].effective = before & ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
    assert system.capset(ctypes.byref(header), held) == 0
    try:
        yield
    finally:
        held[0].effective = before
        assert system.capset(ctypes.byref(header), held) == 0


pytestmark = [
    pytest.mark.usefixtures("as_ordinary_user"),
    pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's"),
]


@pytest.mark.parametrize("command", ["doctor", "partitions"])
@pytest.mark.parametrize("name", OBSTACLES)
def test_data_that_cant_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    """One line, no traceback; who may read what doesn't matter to the superuser alone."""
    task, make, named = OBSTACLES[name]
    data = tmp_path / "data"
    make(data)
    argv = [command, "--task", task, "--data-root", str(data), "--num-partitions", "1"]
    assert main(argv) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert str(tmp_path / named) in lines[0] or named in lines[0]


@pytest.mark.parametrize("command", ["", "doctor", "partitions"])
def test_a_settings_file_that_cant_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Missing, a folder, no TOML, no text, or closed to this user."""
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "syntax.toml").write_bytes(b"a = [")
    (tmp_path / "closed.toml").touch(mode=0)
    for name in ("missing", "folder", "bytes", "syntax", "closed"):
        with pytest.raises(SystemExit) as ended:
            main([*([command] if command else []), "--config", str(tmp_path / f"{name}.toml")])
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert f"{name}.toml" in lines[0]


def test_a_model_that_cant_be_read_and_a_picture_that_cant_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`doctor --model` and `partitions --out`."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"none")
    (tmp_path / "closed").touch(mode=0)
    for flag, names in (("--model", ("bytes", "closed")), ("--out", ("folder", "closed"))):
        command = "doctor" if flag == "--model" else "partitions"
        for name in names:
            path = str(tmp_path / name)
            assert main([command, flag, path]) == 1
            shown = capsys.readouterr().err.strip().splitlines()
            assert len(shown) == 1, shown
            assert path in shown[0]


@pytest.mark.parametrize("name", ["lock", "."])
def test_a_state_dir_that_cant_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A folder where the lock is, or a folder that may not be written to."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    if name == "lock":
        (state_dir / name).mkdir()
    else:
        state_dir.chmod(0o500)
    assert main(["--id", "0", "--state-dir", str(state_dir)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert str(state_dir) in lines[0]

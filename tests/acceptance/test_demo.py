"""`scripts/demo`, in a clone whose environment is there already."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import GENEROUS_S, ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Give a copy of the repository, with this environment as its .venv."""
    copy = tmp_path / "a clone"
    for name in ("scripts", "shared", "fedserver", "fedclient"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    packages = shlex.quote(str(copy / "shared"))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    # What scripts/setup leaves when it has installed the project as pyproject.toml is now.
    checksum = subprocess.run(
        ["cksum"], stdin=(copy / "pyproject.toml").open(), capture_output=True, check=True
    )
    (copy / ".venv" / "installed-plot").write_bytes(checksum.stdout)
    return copy


def type_in(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Type a line in a shell."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "FEDSERVER_ROUNDS": "1",
        "FEDCLIENT_MAX_STEPS": "2",
    }
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )


def test_the_demo_leaves_its_results_here_and_says_what_to_try_next(clone: Path) -> None:
    """What it prints can be typed as it stands; a second demo overwrites nothing of the first."""
    done = type_in(clone, "scripts/demo")
    assert done.returncode == 0, done.stderr
    assert (clone / "demo" / "server" / "model.safetensors").exists()
    _, _, advice = done.stdout.partition("What to try next:\n")
    lines = [line.strip() for line in advice.splitlines() if line.startswith("  ")]
    assert len(lines) == 5
    again = lines.pop()
    for line in lines:
        typed = type_in(clone, line)
        assert typed.returncode == 0, f"{line}:\n{typed.stderr}"
    assert again.startswith("rm -r demo; scripts/demo --partition shards")

    second = type_in(clone, "scripts/demo")
    assert second.returncode == 1
    assert "demo/ is there already" in second.stderr
    assert "rm -r demo" in second.stderr


def test_a_demo_that_never_began_leaves_nothing(clone: Path) -> None:
    """A misspelt setting is said, and the next try isn't refused for it."""
    done = type_in(clone, "scripts/demo --round 3")
    assert done.returncode == 2
    assert "did you mean --rounds?" in done.stderr
    assert not (clone / "demo").exists()


def test_the_demo_shows_the_servers_help(clone: Path) -> None:
    """Whatever makes the server end before it listens ends the demo."""
    done = type_in(clone, "scripts/demo --help")
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout
    assert not (clone / "demo").exists()

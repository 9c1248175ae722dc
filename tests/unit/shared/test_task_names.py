"""A task's or device's mistyped name is refused at once: before torch and before any connection."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedclient.devices import may_have_gpu
from fedclient.settings import ClientSettings
from fedrounds.cli import parse
from fedrounds.errors import InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.names import BUILT_IN_TASKS, validate_task_name

WITHOUT_TORCH = """
import importlib, sys
side, *argv = sys.argv[1:]
code = importlib.import_module(f"{side}.__main__").main(argv)
heavy = sorted({"torch", "numpy", "grpc"} & sys.modules.keys())
print(f"exit code {code}, imported {heavy}", file=sys.stderr)
"""


def test_the_built_in_names_are_those_of_the_tasks() -> None:
    assert [find_task(name).name for name in BUILT_IN_TASKS] == list(BUILT_IN_TASKS)


@pytest.mark.parametrize(
    "side", [["fedserver"], ["fedclient", "--id", "0"]], ids=lambda command: command[0]
)
def test_a_mistyped_task_is_refused_before_torch_is_imported(
    side: list[str], tmp_path: Path
) -> None:
    """And before there is a state-dir or anything about a connection."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *side, "--task", "no_such_module:task"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    sentence, last = ended.stderr.splitlines()
    assert sentence.startswith(f"{side[0]}: task 'no_such_module:task': importing no_such_module")
    assert last == "exit code 1, imported []"
    assert list(tmp_path.iterdir()) == []


SEVERAL_WITHOUT_TORCH = """
import sys
from fedclient.__main__ import main
for argv in sys.argv[1:]:
    try:
        code = main(argv.split())
    except SystemExit as ended:
        code = ended.code
    heavy = sorted({"torch", "numpy", "grpc"} & sys.modules.keys())
    print(f"{argv}: exit code {code}, imported {heavy}", file=sys.stderr)
"""


def test_the_clients_commands_read_their_flags_before_torch_is_imported(tmp_path: Path) -> None:
    """In one process: help, a wrong flag or value, a mistyped task, and a GPU without a driver."""
    expected = {
        "doctor --help": 0,
        "partitions --help": 0,
        "doctor --no-such-flag": 2,
        "partitions --num-partitions 0": 2,
        "doctor --task no_such_module:task": 1,
        "partitions --task no_such_module:task": 1,
    }
    if not may_have_gpu():
        expected |= {"doctor --device cuda": 1, "--id 0 --device mps": 1}
    ended = subprocess.run(
        [sys.executable, "-c", SEVERAL_WITHOUT_TORCH, *expected],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    results = [line for line in ended.stderr.splitlines() if "exit code" in line]
    assert results == [f"{argv}: exit code {code}, imported []" for argv, code in expected.items()]
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_task_is_looked_for_without_running_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is imported only where its folder doesn't hold the module."""
    regular = tmp_path / "our_package"
    regular.mkdir()
    (regular / "__init__.py").write_text("raise RuntimeError('ran')\n")
    (regular / "mine.py").write_text("raise RuntimeError('ran')\n")
    extended = tmp_path / "their_package"
    (extended / "hidden").mkdir(parents=True)
    (extended / "__init__.py").write_text("__path__.append(__path__[0] + '/hidden')\n")
    (extended / "hidden" / "deep.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    validate_task_name("our_package.mine:task")
    assert "our_package" not in sys.modules
    validate_task_name("their_package.deep:task")
    for name in ("their_package.missing", "json.decoder.missing", "no_such_module.mine"):
        with pytest.raises(InvalidInput, match=f"importing {name} failed .there is no module"):
            validate_task_name(f"{name}:task")


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:", "cuda:-1", "cuda 0"])
def test_what_is_no_devices_name_is_refused_with_the_settings(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(ClientSettings, ["--id", "0", "--device", name])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"--device is {name!r}: write it as cpu, auto, cuda, cuda:1 or mps" in error

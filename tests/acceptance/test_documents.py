"""Every block of the README and of docs/ does what a reader expects of it, as it stands.

They are typed one after another in one folder, after the README's "The first federation of your
own". Only the environment is a test's: a free port, three rounds, two steps a round on smaller
shares.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedclient.__main__ import main as client_main
from fedserver.__main__ import main as server_main
from tests.documents import DOCUMENTS, NEEDS, Block, blocks_of
from tests.processes import GENEROUS_S, ROOT, Process, Scene, Server, fixed_port

SERVES = re.compile(r"python -m fedserver(?! [a-z])")
CLIENT = re.compile(r"python -m (fedclient( --|$)|examples.raw_client)")


class Reader:
    """Types blocks in a folder."""

    def __init__(self, folder: Path, scene: Scene) -> None:
        self._folder = folder
        self._scene = scene
        self._typed: set[str] = set()
        port = str(fixed_port())
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'shared'}",
            "PYTHONUNBUFFERED": "1",
            "FEDSERVER_PORT": port,
            "FEDCLIENT_SERVER": f"localhost:{port}",
            "FEDSERVER_ROUNDS": "3",
            "FEDSERVER_NUM_PARTITIONS": "100",
            "FEDCLIENT_MAX_STEPS": "2",
        }

    def type(self, block: Block) -> None:
        """Do what a block says, once; each line must end with exit code 0."""
        if block.text in self._typed:
            return
        self._typed.add(block.text)
        if block.language == "python":
            self._run(block, [sys.executable, "-c", block.text])
        elif any(SERVES.match(line) for line in block.commands()):
            self._type_in_terminals(block)
        else:
            self._run(block, ["bash", "-euc", block.text])

    def _run(self, block: Block, argv: list[str]) -> None:
        done = subprocess.run(
            argv,
            cwd=self._folder,
            env={**os.environ, **self._environment},
            capture_output=True,
            text=True,
            timeout=GENEROUS_S,
            check=False,
        )
        location = f"{block.document}, line {block.line}"
        assert done.returncode == 0, f"{location}:\n{block.text}\n{done.stdout}{done.stderr}"

    def _type_in_terminals(self, block: Block) -> None:
        """Type each line in a terminal of its own, once the server of the line before listens.

        A server without clients is stopped again.
        """
        processes: list[Process] = []
        for line in block.commands():
            process = self._scene.terminal(
                line,
                folder=self._folder,
                environment=self._environment,
                serves=SERVES.match(line) is not None,
            )
            processes.append(process)
            if isinstance(process, Server):
                process.wait_for_line("listening on")
        if not any(CLIENT.match(line) for line in block.commands()):
            processes[0].signal(signal.SIGTERM)
        for process in processes:
            code = process.wait()
            assert code == 0, f"{block.document}, line {block.line}: {process.name} gave {code}"


@pytest.fixture(scope="module")
def reader(module_scene: Scene) -> Reader:
    """Give a reader in a fresh folder."""
    folder = module_scene.folder / "reader"
    folder.mkdir()
    return Reader(folder, module_scene)


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
TYPED = [block for block in BLOCKS if not (block.is_text or block.needs)]
FIRST_FEDERATION = next(block for block in TYPED if "--min-clients 10" in block.text)


def location_of(block: Block) -> str:
    """Return where a block is."""
    return f"{block.document}:{block.line}"


@pytest.mark.parametrize("block", TYPED, ids=location_of)
def test_what_a_document_says_to_type_works(block: Block, reader: Reader) -> None:
    """By then the reader has followed the README's "The first federation of your own"."""
    reader.type(FIRST_FEDERATION)
    reader.type(block)


@pytest.mark.parametrize("block", BLOCKS, ids=location_of)
def test_what_a_block_needs_is_named_and_its_settings_exist(
    block: Block, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs more than a test has, and what benchmarks have written down, is parsed."""
    assert set(block.needs) <= NEEDS.keys()
    for program, *words in block.words():
        main = {"fedserver": server_main, "fedclient": client_main}[program]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print-config"])
        assert ended.value.code == 0, capsys.readouterr().err

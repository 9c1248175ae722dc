"""One server and some clients as separate processes, for the time of a measurement."""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent

# Clients are forked from a process that has imported all: otherwise fifty of them would import
# torch for minutes, and each have pages of its own of what they can share.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "fedclient.loop", "benchmarks.tasks"])


@dataclass(frozen=True)
class Federation:
    """Processes under way; `folder` holds their state-dirs and logs."""

    folder: Path
    server: subprocess.Popen[str]
    clients: list[ForkServerProcess]

    def wait(self) -> None:
        """Return when the run is done.

        Raises:
            RuntimeError: a process failed; the message holds its log.
        """
        self._examine("server", self.server.wait())
        for number, client in enumerate(self.clients):
            client.join()
            self._examine(f"client-{number}", client.exitcode)

    def _examine(self, name: str, code: int | None) -> None:
        if code != 0:
            log = (self.folder / f"{name}.log").read_text()
            raise RuntimeError(f"{name} ended with {code}\n{log[-3000:]}")

    def history(self) -> list[dict[str, Any]]:
        """Return the output of `python -m fedserver history --json`."""
        command = [sys.executable, "-m", "fedserver", "history", "--json"]
        command += ["--state-dir", str(self.folder / "server")]
        history: list[dict[str, Any]] = json.loads(
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        )
        return history


@contextmanager
def started(
    num_clients: int, server_args: list[str], *, client_args: list[str], **environment: str
) -> Iterator[Federation]:
    """Start a server on a free port and its clients; whatever still runs at the end is killed."""
    env = os.environ | environment
    with tempfile.TemporaryDirectory(prefix="fed-bench-") as name:
        folder = Path(name)
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedserver", "--port", "0"),
                *("--state-dir", str(folder / "server"), "--min-clients", str(num_clients)),
                *server_args,
            ],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.log").open("w"),
        )
        assert server.stdout is not None
        first_line = server.stdout.readline()
        if not first_line:
            raise RuntimeError((folder / "server.log").read_text())
        address = first_line.split()[-1]
        clients: list[ForkServerProcess] = []
        try:
            for number in range(num_clients):
                arguments = ["--id", str(number), "--server", address, *client_args]
                arguments += ["--state-dir", str(folder / f"client-{number}")]
                log = folder / f"client-{number}.log"
                client = _FORKS.Process(target=_run_client, args=(arguments, log, environment))
                client.start()
                clients.append(client)
            yield Federation(folder, server, clients)
        finally:
            server.kill()
            server.wait()
            for client in clients:
                client.kill()
                client.join()


def _run_client(arguments: list[str], log: Path, environment: dict[str, str]) -> NoReturn:
    os.environ |= environment
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    from fedclient.__main__ import main  # noqa: PLC0415  # imports nothing that is heavy

    sys.exit(main(arguments))


def peak_memory_mb(pid: int) -> float:
    """Return the largest resident memory of a process so far, by the kernel's own mark.

    Raises:
        OSError: there is no such process.
    """
    return _memory_mb(pid, "VmHWM")


def anonymous_memory_mb(pid: int) -> float:
    """Return the memory of its own that a process holds now, without the pages of libraries.

    How many of those count as resident depends on what the kernel has at hand: 100 MB more or less.

    Raises:
        OSError: there is no such process.
    """
    return _memory_mb(pid, "RssAnon")


def processor_s(pid: int) -> float:
    """Return the processor time that a process and its threads have used so far, in seconds.

    Raises:
        OSError: there is no such process.
    """
    # What clock_getcpuclockid(3) returns on Linux; Python doesn't offer it.
    return time.clock_gettime((~pid << 3) | 2)


def _memory_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0  # it has ended, but nobody has waited for it yet


def machine_line() -> str:
    """Return date and machine, for the head of a result."""
    processor = platform.processor() or platform.machine()
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores ({processor}), "
        f"Python {platform.python_version()}"
    )


def read_section(name: str, *, page: str = "performance.md") -> str:
    """Return the text between a benchmark's marks in a page of docs."""
    rest = (ROOT / "docs" / page).read_text().partition(f"<!-- {name}: begin -->")[2]
    return rest.partition(f"<!-- {name}: end -->")[0]


def write_section(name: str, text: str, *, page: str = "performance.md") -> None:
    """Replace what stands between a benchmark's marks in a page of docs."""
    path = ROOT / "docs" / page
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")

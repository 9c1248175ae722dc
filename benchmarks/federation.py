"""One server and some clients as separate processes, for the time of a measurement."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Federation:
    """Processes under way; `folder` holds their state-dirs and logs."""

    folder: Path
    server: subprocess.Popen[str]
    clients: list[subprocess.Popen[str]]

    def wait(self) -> None:
        """Return when the run is done.

        Raises:
            RuntimeError: a process failed; the message holds the server's log.
        """
        for process in (self.server, *self.clients):
            if process.wait() != 0:
                log = (self.folder / "server.log").read_text()
                raise RuntimeError(
                    f"{process.args!r} ended with {process.returncode}\n{log[-3000:]}"
                )

    def history(self) -> list[dict[str, Any]]:
        """Return what `python -m fedserver history --json` says."""
        command = [sys.executable, "-m", "fedserver", "history", "--json"]
        command += ["--state-dir", str(self.folder / "server")]
        found: list[dict[str, Any]] = json.loads(
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        )
        return found


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
        clients = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "fedclient", "--id", str(client_id)),
                    *("--server", address, "--state-dir", str(folder / f"client-{client_id}")),
                    *client_args,
                ],
                cwd=ROOT,
                env=env,
                text=True,
                stderr=(folder / f"client-{client_id}.log").open("w"),
            )
            for client_id in range(num_clients)
        ]
        try:
            yield Federation(folder, server, clients)
        finally:
            for process in (server, *clients):
                process.kill()
                process.wait()


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
    """Return what stands between a benchmark's marks in a page of docs."""
    rest = (ROOT / "docs" / page).read_text().partition(f"<!-- {name}: begin -->")[2]
    return rest.partition(f"<!-- {name}: end -->")[0]


def write_section(name: str, text: str, *, page: str = "performance.md") -> None:
    """Replace what stands between a benchmark's marks in a page of docs."""
    path = ROOT / "docs" / page
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")

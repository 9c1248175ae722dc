"""Real processes of the service for tests: started, listened to, killed.

A `Scene` is what one test starts: it knows every process and every log, so that a failure can show
both sides, and it ends whatever is left. Nothing here sleeps where a line or an exit can be waited
for; every wait ends after GENEROUS_S with an error that says what didn't come.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from tests import warm_start
from tests.warm_start import WarmProcess

ROOT = Path(__file__).resolve().parent.parent

GENEROUS_S = 240.0
"""Far longer than anything takes: who waits this long has found a defect."""

_SHOWN_LINES = 100


P = TypeVar("P", bound="Process")


def start_module(
    *words: str, environment: Mapping[str, str]
) -> "WarmProcess | subprocess.Popen[str]":
    """Start `python -m WORDS`, warm if it can be; a server shows no summary at the end."""
    complete = {**os.environ, "FEDSERVER_SUMMARY": "false", **environment}
    if warm_start.is_possible(environment):
        return WarmProcess(words, environment=complete)
    return start_program([sys.executable, "-u", "-m", *words], environment=complete, folder=ROOT)


def start_program(
    argv: Sequence[str], *, environment: Mapping[str, str], folder: Path
) -> "subprocess.Popen[str]":
    """Start a program in a folder with this environment alone."""
    return subprocess.Popen(
        argv,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Process:
    """A process of the service; `lines` holds all it has said so far, both streams together."""

    def __init__(self, name: str, popen: "WarmProcess | subprocess.Popen[str]") -> None:
        self.name = name
        self.lines: list[str] = []
        self.stdout_lines: list[str] = []
        self.stderr_lines: list[str] = []
        self.num_lines_before = 0
        self._spoke = threading.Condition()
        self._popen = popen
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream, kept), daemon=True)
            for stream, kept in (
                (self._popen.stdout, [self.lines, self.stdout_lines]),
                (self._popen.stderr, [self.lines, self.stderr_lines]),
            )
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it hasn't ended yet."""
        return self._popen.poll() is None

    @property
    def is_halted(self) -> bool:
        """Whether a signal has stopped it and none has let it go on."""
        return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)

    def wait_for_line(self, pattern: str, *, times: int = 1, timeout_s: float = GENEROUS_S) -> str:
        """Return the line that is the `times`-th to match the regular expression, once it is there.

        Lines said before the call count too.
        """
        matching: list[str] = []

        def is_there() -> bool:
            matching[:] = [line for line in self.lines if re.search(pattern, line)]
            return len(matching) >= times or not any(reader.is_alive() for reader in self._readers)

        with self._spoke:
            self._spoke.wait_for(is_there, timeout_s)
        if len(matching) < times:
            state = "goes on" if self.is_running else f"ended with {self._popen.returncode}"
            raise AssertionError(
                f"{self.name} ({state}) said {pattern!r} {len(matching)} times, not {times}"
            )
        return matching[times - 1]

    def count_lines(self, pattern: str) -> int:
        """Return how many lines so far match the regular expression."""
        return sum(re.search(pattern, line) is not None for line in list(self.lines))

    def has_ended(self, *, within_s: float) -> bool:
        """Return whether it has ended, or ends within so many seconds."""
        try:
            self._popen.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self, timeout_s: float = GENEROUS_S) -> int:
        """Return the exit code once the process has ended and all it said is in `lines`."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} didn't end within {timeout_s:g} s") from None
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it with kill -9."""
        self.signal(signal.SIGKILL)
        code = self.wait()
        assert code == -signal.SIGKILL, f"{self.name} had ended with {code} before the kill landed"

    def peak_rss_bytes(self) -> int:
        """Return the most memory it has held so far, as the kernel counted it."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024

    def rss_bytes(self) -> int:
        """Return the memory it holds now."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def _read(self, stream: IO[str], kept: list[list[str]]) -> None:
        for line in stream:
            with self._spoke:
                for lines in kept:
                    lines.append(line.rstrip("\n"))
                self._spoke.notify_all()
        with self._spoke:
            self._spoke.notify_all()


class Server(Process):
    """A `fedserver` that runs."""

    @property
    def address(self) -> str:
        """Where it listens, host:port, once it says so on standard output."""
        self.wait_for_line("fedserver listening on ")
        (line,) = (line for line in list(self.stdout_lines) if "listening on" in line)
        return line.removeprefix("fedserver listening on ")


class Scene:
    """What one test starts, in a folder of its own; ended when the test is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self._closing: list[Callable[[], None]] = []

    def server(
        self,
        *flags: str | float | Path,
        state: str = "server",
        **environment: str,
    ) -> Server:
        """Start a server with `flags`, on any free port if they name none."""
        words = [str(flag) for flag in flags]
        if "--port" not in words:
            words += ["--port", "0"]
        words = ["fedserver", "--state-dir", str(self.folder / state), *words]
        popen = start_module(*words, environment=environment)
        return self._keep(Server(f"server #{self._count()}", popen))

    def client(
        self,
        client_id: int | str,
        address: str,
        *flags: str | float | Path,
        state: str | None = None,
        **environment: str,
    ) -> Process:
        """Start a client, or many in one process ("0-2"); `state` names its folder.

        It must if two processes are to have one id.
        """
        folder = self.folder / (state or f"client-{client_id}")
        which = ["--id" if isinstance(client_id, int) else "--ids", str(client_id)]
        words = ["fedclient", *which, "--server", address]
        words += ["--state-dir", str(folder), *(str(flag) for flag in flags)]
        popen = start_module(*words, environment=environment)
        return self._keep(Process(f"client {client_id} #{self._count()}", popen))

    def terminal(
        self, line: str, *, folder: Path, environment: Mapping[str, str], serves: bool = False
    ) -> Process:
        """Type a line in a terminal of its own, in a folder; `serves`: it starts a server."""
        kind = Server if serves else Process
        complete = {**os.environ, **environment}
        popen = start_program(["bash", "-c", f"exec {line}"], environment=complete, folder=folder)
        return self._keep(kind(line, popen))

    def command(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `fedserver COMMAND ...` to its end."""
        words = ["fedserver", *(str(word) for word in argv)]
        process = Process(" ".join(words), start_module(*words, environment={}))
        code = process.wait()
        stdout, stderr = (
            "".join(f"{line}\n" for line in lines)
            for lines in (process.stdout_lines, process.stderr_lines)
        )
        return subprocess.CompletedProcess(words, code, stdout, stderr)

    def history(self, *flags: str, state: str = "server") -> list[dict[str, Any]]:
        """Return what `fedserver history --json` prints; it must be JSON as the standard has it."""
        done = self.command("history", "--json", "--state-dir", self.folder / state, *flags)
        assert done.returncode == 0, done.stderr
        rounds = json.loads(done.stdout, parse_constant=_refuse_constant)
        assert isinstance(rounds, list)
        return rounds

    def at_end(self, close: Callable[[], None]) -> None:
        """Call `close` when the test is over and its processes have ended."""
        self._closing.append(close)

    def mark(self) -> None:
        """Let `logs` begin here: what was said before belongs to other tests."""
        for process in self.processes:
            process.num_lines_before = len(process.lines)

    def logs(self) -> str:
        """Return what every process has said since the last mark."""
        parts = []
        for process in self.processes:
            lines = process.lines[process.num_lines_before :]
            if lines or process.is_running:
                left_out = len(lines) - _SHOWN_LINES
                head = [f"... {left_out} lines before"] if left_out > 0 else []
                parts.append("\n".join([f"==== {process.name}", *head, *lines[-_SHOWN_LINES:]]))
        return "\n".join(parts)

    def close(self) -> None:
        """End everything that still goes on."""
        for process in self.processes:
            if process.is_running:
                process.signal(signal.SIGKILL)
                process.wait()
        for close in self._closing:
            close()

    def _count(self) -> int:
        return len(self.processes) + 1

    def _keep(self, process: P) -> P:
        self.processes.append(process)
        return process


def wait_until(is_so: Callable[[], bool], *, what: str, every_s: float = 0.01) -> None:
    """Ask again and again until it is so; for what the server gives no event for."""
    gave_up = threading.Event()
    timer = threading.Timer(GENEROUS_S, gave_up.set)
    timer.start()
    try:
        while not is_so():
            assert not gave_up.wait(every_s), f"waited {GENEROUS_S:g} s in vain for {what}"
    finally:
        timer.cancel()


def fixed_port() -> int:
    """Return a free port for a server that is to come back at the same one.

    From below the ports the kernel gives to outgoing connections: while the server is away, a
    client that dials its port could otherwise be given that very port, and talk to itself.
    """
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"the history holds {name}, which is no JSON")

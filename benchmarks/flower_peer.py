"""The same rounds on Flower, which lives in an environment of its own and isn't imported here.

A SuperLink, one SuperNode per client and the app in benchmarks/flower_app/, all as Flower sets them
up unless told otherwise: state in memory, its own polling intervals, a process for each client's
task. Nothing is trained, encrypted, evaluated, reported or fetched.
"""

import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.federation import peak_memory_mb

_APP = Path(__file__).resolve().parent / "flower_app"
_NUM_WARM_UP = 1
_STARTUP_S = 120.0
# What would lead the other environment back into ours.
_NOT_INHERITED = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


@dataclass(frozen=True)
class Peer:
    """An environment with Flower in it: its folder of commands and Flower's version."""

    commands: Path
    version: str


@dataclass(frozen=True)
class PeerMeasured:
    """One case on Flower: seconds per round, and peak MB of SuperLink and ServerApp together."""

    round_s: float
    server_peak_mb: float


def find_peer(python: Path) -> Peer:
    """Return the environment of this Python.

    Raises:
        RuntimeError: there is no Flower in it.
    """
    ask = "import importlib.metadata as m; print(m.version('flwr'))"
    commands = python.absolute().parent  # not resolved: an environment's python is a link
    try:
        asked = subprocess.run(
            [python, "-I", "-c", ask], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"no Flower at {python}; `{python} -m pip install flwr`") from error
    if not (commands / "flower-superlink").exists():
        raise RuntimeError(f"{python} knows flwr, but {commands} has no flower-superlink")
    return Peer(commands, asked.stdout.strip())


def measure(peer: Peer, megabytes: float, num_clients: int, num_measured: int) -> PeerMeasured:
    """Run a warm-up round and `num_measured` more, of which the median counts.

    Raises:
        RuntimeError: a process of Flower ended, or the rounds weren't what they should be.
    """
    with tempfile.TemporaryDirectory(prefix="fed-flower-") as name, ExitStack() as cleanup:
        folder = Path(name)
        cleanup.callback(_kill_all, folder)
        link_port, *node_ports = _free_ports(1 + num_clients)
        address = f"127.0.0.1:{link_port}"
        link = _start(peer, folder, "superlink", "flower-superlink", "--port", str(link_port))
        _wait_until_healthy(folder, link, f"http://{address}/health")
        processes = {"superlink": link}
        for at, port in enumerate(node_ports):
            log, options = f"supernode-{at}", ("--superlink", address, "--port", str(port))
            processes[log] = _start(peer, folder, log, "flower-supernode", *options)
        (folder / "config.toml").write_text(
            f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        )
        results = folder / "results.json"
        (folder / "run.toml").write_text(
            f"num-bytes = {int(megabytes * 1e6)}\nnum-clients = {num_clients}\n"
            f'num-rounds = {_NUM_WARM_UP + num_measured}\nresults = "{results}"\n'
        )
        config = ("--run-config", str(folder / "run.toml"))
        run = _start(peer, folder, "run", "flwr", "run", str(_APP), "here", "--stream", *config)
        while run.poll() is None:
            for log, process in processes.items():
                if process.poll() is not None:
                    raise _failure(folder, log, f"ended with {process.returncode}")
            time.sleep(0.2)
        if not results.exists():
            raise _failure(folder, "run", "gave no results")
        measured = json.loads(results.read_text())
        peak_mb = peak_memory_mb(link.pid) + measured["peak_mb"]
    took_s = [after - before for before, after in itertools.pairwise(measured["ended_s"])]
    return PeerMeasured(statistics.median(took_s[_NUM_WARM_UP:]), peak_mb)


def _start(peer: Peer, folder: Path, log: str, *command: str) -> subprocess.Popen[bytes]:
    """Start one of Flower's commands; it writes to `log`.log in `folder`."""
    # Servers and nodes talk over this machine's loopback alone, so without encryption.
    insecure = ["--insecure"] if command[0] != "flwr" else []
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    env |= {
        "PATH": f"{peer.commands}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1",
    }
    with (folder / f"{log}.log").open("wb") as output:
        return subprocess.Popen(
            [peer.commands / command[0], *command[1:], *insecure],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_healthy(folder: Path, link: subprocess.Popen[bytes], url: str) -> None:
    end_s = time.monotonic() + _STARTUP_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while link.poll() is None and time.monotonic() < end_s:
        try:
            direct.open(url, timeout=1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise _failure(folder, "superlink", f"didn't answer at {url}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]


def _kill_all(folder: Path) -> None:
    """Kill whatever was started with this FLWR_HOME, also what left its parent's session."""
    while running := [process for process in psutil.process_iter() if _lives_in(process, folder)]:
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=5.0)


def _lives_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(
            "FLWR_HOME"
        ) == str(folder)
    except psutil.Error:
        return False


def _failure(folder: Path, log: str, what: str) -> RuntimeError:
    text = (folder / f"{log}.log").read_text(errors="replace")
    return RuntimeError(f"Flower's {log} {what}\n{text[-3000:]}")

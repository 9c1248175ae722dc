"""Processes of the service that start at once: forked from one that has imported torch.

A process that imports torch takes seconds of processor time to start, and the tests start hundreds.
`python -m tests.warm_start FD` imports the service's modules, runs nothing, and forks a process for
each request that it reads from the socket FD. Such a process has its own memory, environment, files
and signals. It can't show how long a start takes, how much memory an import costs, what is read
from the environment at import or what the interpreter takes apart at its end: tests of these set
FED_COLD_START=1. Set for pytest, it starts every process cold, as a user does.

A request is JSON: the arguments after `python -m`, the environment; with it come the descriptors
of standard output and standard error. The answer is the process's id and a pidfd; the exit code
follows when the process has ended.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import queue
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from fedrounds import failpoints
from fedrounds.cli import silence_grpc

ROOT = Path(__file__).resolve().parent.parent

_READ_AT_START = ("HOME", "PYTHON", "LD_", "MALLOC_", "OMP_", "MKL_", "TORCH", "CUDA")
"""How the variables begin that a forked process would find read already."""

_MAX_REQUEST_BYTES = 1 << 17
_GENEROUS_S = 240.0


def is_possible(given: Mapping[str, str]) -> bool:
    """Return whether a process can be forked that is `given` these variables of its own."""
    is_cold = {**os.environ, **given}.get("FED_COLD_START", "0") != "0"
    return (
        # pidfds are Linux's own.
        sys.platform == "linux"
        and not is_cold
        and not any(name.startswith(_READ_AT_START) for name in given)
    )


class WarmProcess:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, argv: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self.args = list(argv)
        outputs = [os.pipe() for _ in range(2)]
        try:
            self.pid, self._pidfd, self._exit_code = _nursery().fork(
                self.args, environment, [written for _, written in outputs]
            )
        finally:
            for _, written in outputs:
                os.close(written)
        weakref.finalize(self, os.close, self._pidfd)
        self.stdout, self.stderr = (os.fdopen(read, encoding="utf-8") for read, _ in outputs)

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self._exit_code.result() if self._exit_code.done() else None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once the process has ended.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        try:
            return self._exit_code.result(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout or 0) from None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


class _Nursery:
    """The process that forks, and the thread that hears from it."""

    def __init__(self) -> None:
        self._control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.warm_start", str(far_end.fileno())],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=[far_end.fileno()],
        )
        far_end.close()
        self._one_at_a_time = threading.Lock()
        self._births: queue.SimpleQueue[tuple[int, int, Future[int]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._hear, name="warm start", daemon=True).start()

    def fork(
        self, argv: Sequence[str], environment: Mapping[str, str], outputs: Sequence[int]
    ) -> tuple[int, int, Future[int]]:
        """Return the id, the pidfd and the exit code to come of a new process."""
        request = json.dumps({"argv": argv, "environment": dict(environment)}).encode()
        assert len(request) <= _MAX_REQUEST_BYTES
        with self._one_at_a_time:
            socket.send_fds(self._control, [request], list(outputs))
            born = self._births.get(timeout=_GENEROUS_S)
            assert born is not None, "the process that forks has ended; it has said why"
            return born

    def close(self) -> None:
        """End the process that forks, and with it all that it forked."""
        self._control.shutdown(socket.SHUT_RDWR)
        self._process.wait()

    def _hear(self) -> None:
        exit_codes: dict[int, Future[int]] = {}
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._control, _MAX_REQUEST_BYTES, 1)
            if not data:
                self._births.put(None)
                return
            message = json.loads(data)
            pid = message["pid"]
            if descriptors:
                exit_codes[pid] = Future()
                self._births.put((pid, descriptors[0], exit_codes[pid]))
            else:
                exit_codes.pop(pid).set_result(message["code"])


@functools.cache
def _nursery() -> _Nursery:
    nursery = _Nursery()
    atexit.register(nursery.close)
    return nursery


def _import_all() -> None:
    """Import the service's modules, as quietly as the service does."""
    verbosity = os.environ.get("GRPC_VERBOSITY")
    silence_grpc()
    for package in ("fedrounds", "fedserver", "fedclient"):
        imported = importlib.import_module(package)
        for module in pkgutil.walk_packages(imported.__path__, f"{package}."):
            if not module.name.endswith("__main__") and ".migrations." not in module.name:
                importlib.import_module(module.name)
    if verbosity is None:
        del os.environ["GRPC_VERBOSITY"]


def _serve(control: socket.socket) -> Callable[[], None]:
    """Fork as asked; return, in a forked process only, what it is to run."""
    children: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), *children], [], [])
        for pidfd in children.keys() & set(ready):
            pid = children.pop(pidfd)
            os.close(pidfd)
            _, status = os.waitpid(pid, 0)
            control.send(
                json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode()
            )
        if control.fileno() not in ready:
            continue
        data, outputs, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 2)
        if not data:
            for pid in children.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            control.close()
            for pidfd in children:
                os.close(pidfd)
            return functools.partial(_become, json.loads(data), outputs)
        for output in outputs:
            os.close(output)
        pidfd = os.pidfd_open(pid)
        children[pidfd] = pid
        socket.send_fds(control, [json.dumps({"pid": pid}).encode()], [pidfd])


def _become(request: Mapping[str, Any], outputs: Sequence[int]) -> None:
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    # The one module of ours that reads the environment when it is imported.
    importlib.reload(failpoints)
    module, *arguments = request["argv"]
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        code = ended.code or 0
    _end(code)


def _end(code: int) -> NoReturn:
    """End as the interpreter does, but leave the inherited modules as they are.

    To take them apart is half a second of processor time, most of it for pages that were shared.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _import_all()
    # Else a child spends a second on what it has inherited, at its end.
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))()

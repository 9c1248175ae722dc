"""SIGINT and SIGTERM end a process, and leave the processes that a task's own code starts alone.

No signal is blocked: a blocked signal stays blocked in every child process, even through exec, and
nobody can terminate such a child. The signal handler does almost nothing, for two reasons: it runs
inside whatever the main thread does, which may hold the lock that the handler needs, and it doesn't
run before native code returns. The interpreter writes the number of each signal to a pipe
(signal.set_wakeup_fd), and a thread that reads the pipe does the rest. A forked child gets back
the handlers of before.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

_ASKING = (signal.SIGINT, signal.SIGTERM)
_OVER = b"\0"
_PATIENCE_S = 1.5


class StopSignals:
    """SIGINT and SIGTERM ask this process to stop, once; later signals change nothing.

    A context manager for the main thread; one at a time in a process. At the end of the block the
    previous handlers come back, unless a signal has come: then further signals are ignored until
    the process has ended, so that a second Ctrl-C doesn't make a clean end look like a failure.
    `exit_code` is that of a process that had to be cut off (see `interrupting`).
    """

    def __init__(self, *, exit_code: int) -> None:
        self._exit_code = exit_code
        self._is_asked = False
        self._is_interruptible = False
        self._outside = threading.Event()
        self._outside.set()
        self._lock = threading.Lock()
        self._is_announced = False
        self._acts: list[Callable[[], None]] = []
        self._before: dict[signal.Signals, Any] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._listener = threading.Thread(target=self._listen, name="stop signals", daemon=True)

    def __enter__(self) -> Self:
        global _in_force  # noqa: PLW0603  # a process has one set of signal handlers
        assert _in_force is None
        _in_force = self
        os.register_at_fork(after_in_child=self._forget_in_child)
        # Exit hooks run last in, first out: this hook runs after those of later imports.
        atexit.register(self._ignore_signals)
        self._listener.start()
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in _ASKING:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_asked:
            _terminate_children()
            return
        self._restore()
        os.write(self._write_end, _OVER)
        self._listener.join()
        self._close()

    def when_asked(self, act: Callable[[], None]) -> None:
        """Call `act` from another thread when a signal comes; at once if a signal has come."""
        with self._lock:
            if not self._is_announced:
                self._acts.append(act)
                return
        act()

    @contextmanager
    def _interrupting(self) -> Iterator[None]:
        self._outside.clear()
        self._is_interruptible = True
        try:
            try:
                if self._is_asked:
                    raise KeyboardInterrupt
                yield
            finally:
                self._is_interruptible = False
        finally:
            self._outside.set()

    def _hear(self, *_: object) -> None:
        is_first, self._is_asked = not self._is_asked, True
        if is_first and self._is_interruptible:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        # Signals of other kinds that have a handler write their number too.
        numbers = b""
        while not any(number in _ASKING for number in numbers):
            if _OVER in numbers:
                return
            numbers = os.read(self._read_end, 64)
        with self._lock:
            self._is_announced = True
        for act in self._acts:
            act()
        if not self._outside.wait(_PATIENCE_S):
            _terminate_children()
            logger.warning("stopped; the task's own code didn't end in time and was cut off")
            os._exit(self._exit_code)

    def _restore(self) -> None:
        global _in_force  # noqa: PLW0603
        _in_force = None
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)

    def _close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)

    def _forget_in_child(self) -> None:
        if _in_force is self:
            self._restore()
            self._close()

    def _ignore_signals(self) -> None:
        if _in_force is self:
            signal.set_wakeup_fd(-1)
            _hide_lost_signals()
            for number in _ASKING:
                signal.signal(number, signal.SIG_IGN)


def interrupting() -> AbstractContextManager[None]:
    """Let the first SIGINT or SIGTERM raise KeyboardInterrupt in this block of the main thread.

    For a task's own code, which may take minutes and doesn't check for a stop. If it goes on
    for more than 1.5 s after the signal (in a native call, or behind a bare except), the process is
    cut off; it goes on later as after kill -9. Without StopSignals in force this does nothing.
    """
    return nullcontext() if _in_force is None else _in_force._interrupting()


_in_force: StopSignals | None = None


def _hide_lost_signals() -> None:
    """Say nothing of a signal that arrives while its handler is replaced by SIG_IGN.

    The interpreter reports it as an unraisable OSError, a traceback on standard error. The signal
    was to be ignored anyway.
    """
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, OSError) and "ignored due to race condition" in str(error)):
            report(unraisable)

    sys.unraisablehook = report_others


def _terminate_children() -> None:
    """Terminate the processes that multiprocessing has started here.

    The interpreter's exit does so with daemonic processes only, and waits for all others.
    """
    for child in multiprocessing.active_children():
        child.terminate()

"""A process that gets the signal to stop again and again ends once, cleanly and silently."""

import subprocess
import sys

STOPPED_AND_STOPPED_AGAIN = """
import atexit, ctypes, os, signal
from fedrounds.stop_signals import StopSignals

libc = ctypes.CDLL(None)
libc.signal.restype = ctypes.c_void_p
libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)

@atexit.register
def deliver_late():
    # The interpreter's own handler, called as the kernel calls it for a signal that has arrived
    # just before the handler was replaced.
    ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)

with StopSignals(exit_code=0):
    handler = libc.signal(signal.SIGTERM, None)
    libc.signal(signal.SIGTERM, handler)
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_that_arrives_while_its_handler_is_replaced_leaves_no_trace() -> None:
    """Exit hooks run last in, first out: the late signal comes after StopSignals ignores it."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AND_STOPPED_AGAIN],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

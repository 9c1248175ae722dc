"""Standard output whose errors name it, such as that of a full disk."""

import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedrounds.cli import print_error
from fedrounds.errors import StorageUnusable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _StandardOutput(io.FileIO):
    """The descriptor of standard output; after the first error it drops what is written.

    A buffer keeps what it couldn't write, and would fail again when Python ends.
    """

    _has_failed = False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write bytes and return how many were written.

        Raises:
            BrokenPipeError: nobody reads the output any more.
            StorageUnusable: it can't be written for another reason.
        """
        if self._has_failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError:
            self._has_failed = True
            raise
        except OSError as error:
            self._has_failed = True
            raise StorageUnusable(
                f"the output can't be written ({error.strerror}); send it elsewhere"
            ) from error


def run_program(name: str, main: Callable[[list[str]], int]) -> int:
    """Return the exit code of `main`, or 1 if its output can't be written.

    Output that is still in a buffer at the end is written here, so that a failure gets a sentence.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _naming_errors(sys.stdout)
    try:
        try:
            return main(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        return 1
    except StorageUnusable as error:
        print_error(name, error)
        return 1


def _naming_errors(stdout: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream to the same descriptor, with the same encoding and buffering."""
    descriptor = _StandardOutput(stdout.fileno(), "wb", closefd=False)
    is_buffered = isinstance(stdout.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor) if is_buffered else descriptor,
        encoding=stdout.encoding,
        errors=stdout.errors,
        line_buffering=stdout.line_buffering,
        write_through=stdout.write_through,
    )

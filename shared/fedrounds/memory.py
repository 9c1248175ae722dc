"""Memory: what the garbage collector examines, and when the C library returns freed memory.

Only glibc's settings are changed.
"""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_LARGEST_BLOCK_KEPT_BYTES = 32 << 20
_MAX_BYTES_KEPT = (1 << 31) - 1


@contextmanager
def importing_what_stays() -> Iterator[None]:
    """Import in this block what the process needs to its end: the collector never examines it.

    `import torch` makes hundreds of thousands of objects. Examining them again and again takes a
    fifth of the import's time, and a second of processor time when the process exits.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def keep_one_heap() -> None:
    """Let all threads allocate from one heap; call this before any thread starts.

    For the server: message buffers of a mebibyte come and go between small things that stay. With a
    heap per thread and dynamic thresholds, sixty uploads left 70 MiB of holes behind; one heap
    whose free pages are given back now and then holds what is in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_pages() -> None:
    """Give the pages in the heap's holes back to the operating system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Take memory from the operating system once, and use it again for the next order.

    For a client: every order makes a model and a copy of it. Fresh pages for a model of 25 MB and
    its copy cost 24 ms of the 59 that its whole way through the client takes. One heap for all
    threads, or each would keep what it once had.
    """
    keep_one_heap()
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _MAX_BYTES_KEPT)

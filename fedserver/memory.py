"""Keeping the C library from holding on to memory that was freed.

Message buffers of a mebibyte come and go between small things that stay. With a heap per thread
and dynamic thresholds, sixty uploads left 70 MiB of holes behind; one heap whose free pages are
given back now and then holds what is in use. Other C libraries than glibc are left alone.
"""

import ctypes
import ctypes.util
import platform

_M_ARENA_MAX = -8


def keep_one_heap() -> None:
    """Let all threads allocate from one heap; to be called before there are threads."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_pages() -> None:
    """Give the pages in the heap's holes back to the operating system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

"""Repeatable computation with torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(*, num_threads: int) -> Iterator[None]:
    """Make torch's results repeatable within this block.

    It uses deterministic algorithms, with a warning for an operation that has none, and
    `num_threads` threads: another number splits sums differently, which changes their last bits.
    Both are restored afterwards, since a task's own code may want other values when it loads data.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
    )
    _set(is_deterministic=True, warn_only=True, num_threads=num_threads)
    try:
        yield
    finally:
        is_deterministic, warn_only, num_threads = before
        _set(is_deterministic=is_deterministic, warn_only=warn_only, num_threads=num_threads)


def _set(*, is_deterministic: bool, warn_only: bool, num_threads: int) -> None:
    """Set the flags without torch's compiler, unless it is loaded.

    The public function imports the compiler to set one of its flags: 150 MB, seconds of processor
    time, and an error if no temporary folder can be written to. The private function does all the
    rest, also in torch 2.6. If it is missing, the public function is correct but expensive.
    """
    torch.set_num_threads(num_threads)
    set_flags = getattr(torch._C, "_set_deterministic_algorithms", None)
    if set_flags is None or "torch._dynamo" in sys.modules:
        set_flags = torch.use_deterministic_algorithms
    set_flags(is_deterministic, warn_only=warn_only)

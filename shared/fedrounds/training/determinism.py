"""How torch computes while results must repeat."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(*, num_threads: int) -> Iterator[None]:
    """Let torch compute in this block so that the same numbers come out each time.

    Deterministic algorithms, with a warning where an operation has none, and so many threads: sums
    in other parts differ in their last bits. Afterwards both are as they were, since a task's own
    code may want them otherwise where it loads its data.
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

    The public function imports the compiler to set a flag of it: 150 MB, seconds of processor time,
    and an error where no temporary folder can be written to. The private function is all the rest
    that it does, also in torch 2.6; without it the public one is right, if dear.
    """
    torch.set_num_threads(num_threads)
    set_flags = getattr(torch._C, "_set_deterministic_algorithms", None)
    if set_flags is None or "torch._dynamo" in sys.modules:
        set_flags = torch.use_deterministic_algorithms
    set_flags(is_deterministic, warn_only=warn_only)

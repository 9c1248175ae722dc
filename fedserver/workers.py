"""The threads that keep tensor work, disk and database off the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from shared.files import exhaustion

P = ParamSpec("P")
R = TypeVar("R")


class Workers:
    """One thread for the database, so that its writers never wait for each other; some for disks.

    The disk threads are few on purpose: tensor work in them is memory-bound.
    """

    def __init__(self, *, disk_threads: int = 4) -> None:
        self._store = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._disk = ThreadPoolExecutor(disk_threads, thread_name_prefix="disk")

    async def in_store(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call of the store; such calls run one after another, in order.

        Raises:
            OutOfSpace: the disk is full, or no further file can be opened.
        """
        return await _run(self._store, partial(call, *args, **kwargs))

    async def on_disk(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that blocks on the disk or computes.

        Raises:
            OutOfSpace: the disk is full, or no further file can be opened.
        """
        return await _run(self._disk, partial(call, *args, **kwargs))

    def close(self) -> None:
        """Return when every call begun has ended; those not begun are dropped."""
        for pool in (self._disk, self._store):
            pool.shutdown(cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, call: Callable[[], R]) -> R:
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call)
    except OSError as error:
        if (named := exhaustion(error)) is not None:
            raise named from error
        raise

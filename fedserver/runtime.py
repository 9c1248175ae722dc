"""The event loop's threads for calls that block, its broadcasts, and its clock."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from fedrounds.files import exhaustion

P = ParamSpec("P")
R = TypeVar("R")


_TICK_S = 1.0
_AWAY_S = 10.0
"""A silence of the event loop that can't be its ordinary work."""


class Threads:
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
        """Return when every call that has begun has ended; the others are dropped."""
        for pool in (self._disk, self._store):
            pool.shutdown(cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, call: Callable[[], R]) -> R:
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call)
    except OSError as error:
        if (named := exhaustion(error)) is not None:
            raise named from error
        raise


class Broadcast:
    """A condition without a state: wakes everybody who waits for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits now."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Return True on the next change, False when `timeout_s` seconds are over."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class ServingClock:
    """Seconds of a monotonic clock, without the times in which nothing could be served.

    The clock of leases and stall rules: a process that was stopped (SIGSTOP, a frozen container, a
    machine without processor time) comes back to clients that could not reach it, and its absence
    is nobody's lateness.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.away_s = 0.0
        self._clock = clock
        self._looked_at = clock()

    def __call__(self) -> float:
        """Return the time; a long silence since the last look doesn't count."""
        now = self._clock()
        silence_s = now - self._looked_at
        if silence_s > _AWAY_S:
            self.away_s += silence_s
        self._looked_at = now
        return now - self.away_s

    async def keep(self, on_absence: Callable[[float], Awaitable[None]]) -> None:
        """Look at the clock for ever; call `on_absence` with the seconds of each absence."""
        known_s = self.away_s
        while True:
            await asyncio.sleep(_TICK_S)
            self()
            if self.away_s > known_s:
                lately_s, known_s = self.away_s - known_s, self.away_s
                await on_absence(lately_s)

"""The clock of leases and stall rules: it stands still while the server itself was away.

A process that was stopped (SIGSTOP, a frozen container, a machine without processor time) comes
back to clients that could not reach it: its absence is nobody's lateness.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

_TICK_S = 1.0
_AWAY_S = 10.0
"""A silence of the event loop that can't be its ordinary work."""


class ServingClock:
    """Seconds of a monotonic clock, without the times in which nothing could be served."""

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

    async def keep(self, tell: Callable[[float], Awaitable[None]]) -> None:
        """Look at the clock for ever; tell how many seconds the server was away when it was."""
        known_s = self.away_s
        while True:
            await asyncio.sleep(_TICK_S)
            self()
            if self.away_s > known_s:
                lately_s, known_s = self.away_s - known_s, self.away_s
                await tell(lately_s)

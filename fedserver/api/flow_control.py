"""What keeps one client from holding up the others: places, and few streams of one kind.

Whoever waits for a place is heard of, and gets it in the order of coming.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fedrounds.errors import ServerUnreachable, StreamFenced

_FIRST_MESSAGE_S = 5.0
"""A client has its first message ready when it calls; until then nobody knows whose call it is."""


async def first_message(messages: AsyncIterator[bytes]) -> bytes:
    """Return what a stream begins with; nothing if it ends without a message.

    Raises:
        ServerUnreachable: it doesn't come.
    """
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            return await anext(messages, b"")
    except TimeoutError:
        raise ServerUnreachable(
            f"nothing came for {_FIRST_MESSAGE_S:g} s; send the header first, and at once"
        ) from None


class Slots:
    """So many go on at a time; the others wait."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def are_wanted(self) -> bool:
        """Whether somebody waits for a place."""
        return bool(self._waiting)

    @asynccontextmanager
    async def hold(
        self, *, every_s: float, while_waiting: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Hold a place; `while_waiting` is called every so often until it is there."""
        place = asyncio.get_running_loop().create_future()
        if self._num_free:
            self._num_free -= 1
            place.set_result(None)
        else:
            self._waiting.append(place)
        try:
            while not place.done():
                if not (await asyncio.wait([place], timeout=every_s))[0]:
                    while_waiting()
            yield
        finally:
            if not place.done():
                self._waiting.remove(place)
            elif self._waiting:
                self._waiting.popleft().set_result(None)
            else:
                self._num_free += 1


class StreamFence:
    """Of the streams with one key the newest go on, so many of them; they end the older ones."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._fences: dict[str, list[asyncio.Timeout]] = {}

    @asynccontextmanager
    async def join(self, key: str, *, what: str) -> AsyncIterator[None]:
        """Go on until newer streams take over; `what` this is, in words.

        Raises:
            StreamFenced: they have.
        """
        fences = self._fences.setdefault(key, [])
        if len(fences) == self._num_kept:
            # Its time is up: that wakes it, whatever it waits for.
            fences.pop(0).reschedule(0)
        fence = asyncio.timeout(None)
        try:
            async with fence:
                fences.append(fence)
                yield
        except TimeoutError:
            if not fence.expired():
                raise
            raise StreamFenced(f"a newer {what} took over; this one stops") from None
        finally:
            with suppress(ValueError):
                fences.remove(fence)
            if not self._fences.get(key):
                self._fences.pop(key, None)

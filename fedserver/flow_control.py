"""Flow control: slots limit what goes on at a time, a fence separates a key's streams.

A client that waits for a slot isn't late; slots are given in the order of coming.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fedrounds.errors import ServerUnreachable, StreamFenced

_FIRST_MESSAGE_S = 5.0
"""A client has its first message ready when it calls; until then nobody knows whose call it is."""


async def first_message(messages: AsyncIterator[bytes]) -> bytes:
    """Return a stream's first message; empty if the stream ends without a message.

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
    """At most `num_slots` go on at a time; the others wait their turn."""

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def are_wanted(self) -> bool:
        """Whether somebody waits for a slot."""
        return bool(self._waiting)

    @asynccontextmanager
    async def hold(
        self, *, every_s: float, while_waiting: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Hold a slot; `while_waiting` is called every `every_s` seconds until a slot is free."""
        slot = asyncio.get_running_loop().create_future()
        if self._num_free:
            self._num_free -= 1
            slot.set_result(None)
        else:
            self._waiting.append(slot)
        try:
            while not slot.done():
                if not (await asyncio.wait([slot], timeout=every_s))[0]:
                    while_waiting()
            yield
        finally:
            if not slot.done():
                self._waiting.remove(slot)
            elif self._waiting:
                # Handed on, not given back: a client that comes now can't overtake who waits.
                self._waiting.popleft().set_result(None)
            else:
                self._num_free += 1


class StreamFence:
    """Of the streams with the same key the newest `num_kept` go on; they end older streams."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._fences: dict[str, list[asyncio.Timeout]] = {}

    @asynccontextmanager
    async def join(self, key: str, *, what: str) -> AsyncIterator[None]:
        """Go on until newer streams take over; `what` is the stream in words.

        Raises:
            StreamFenced: newer streams have taken over.
        """
        fences = self._fences.setdefault(key, [])
        if len(fences) == self._num_kept:
            # The oldest stream's time is up: that wakes it, whatever it waits for.
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

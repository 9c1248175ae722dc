"""Slots in the order of coming, the fence between streams of a key, a stream's first message."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedrounds.errors import ServerUnreachable, StreamFenced
from fedserver import flow_control
from fedserver.flow_control import Slots, StreamFence, first_message


def test_slots_are_given_in_the_order_of_coming() -> None:
    """A slot that is given back goes to who has waited longest, not to who comes now."""

    async def take_turns() -> list[str]:
        slots, log = Slots(1), []
        may_end = {name: asyncio.Event() for name in "abc"}

        async def hold(name: str) -> None:
            async with slots.hold(every_s=60, while_waiting=lambda: None):
                log.append(name)
                await may_end[name].wait()

        holders = {name: asyncio.create_task(hold(name)) for name in "abc"}
        await asyncio.sleep(0)
        assert log == ["a"]
        assert slots.are_wanted
        may_end["a"].set()
        await holders["a"]
        late = asyncio.create_task(hold("a"))
        for name in "bc":
            may_end[name].set()
            await holders[name]
        await late
        assert not slots.are_wanted
        return log

    assert asyncio.run(take_turns()) == ["a", "b", "c", "a"]


def test_who_waits_for_a_slot_is_heard_of_and_may_go_away() -> None:
    """A cancelled wait takes no slot along."""

    async def wait() -> int:
        slots, num_heard = Slots(1), 0
        has_been_heard = asyncio.Event()

        def hear() -> None:
            nonlocal num_heard
            num_heard += 1
            if num_heard == 2:
                has_been_heard.set()

        async def hold() -> None:
            async with slots.hold(every_s=0.01, while_waiting=hear):
                pass

        async with slots.hold(every_s=60, while_waiting=lambda: None):
            waiting = asyncio.create_task(hold())
            await has_been_heard.wait()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(hold(), 60)
        return num_heard

    assert asyncio.run(wait()) >= 2


def test_a_wait_that_ends_with_an_error_takes_no_slot_along() -> None:
    """Whatever `while_waiting` raises ends the wait."""

    async def wait() -> None:
        slots = Slots(1)

        def fail() -> None:
            raise ServerUnreachable("the order has ended")

        async with slots.hold(every_s=60, while_waiting=lambda: None):
            with pytest.raises(ServerUnreachable):
                async with slots.hold(every_s=0.01, while_waiting=fail):
                    pass
            assert not slots.are_wanted
        async with slots.hold(every_s=60, while_waiting=fail):
            pass

    asyncio.run(wait())


def test_the_newest_streams_of_a_key_go_on() -> None:
    """Two are kept: the third ends the first. Another key is none of their business."""

    async def join() -> list[str]:
        fence, ended = StreamFence(2), []
        may_end = asyncio.Event()

        async def stream(name: str, key: str) -> None:
            try:
                async with fence.join(key, what="download"):
                    await may_end.wait()
            except StreamFenced as error:
                ended.append(f"{name}: {error}")

        streams = []
        for name, key in (("a", "key"), ("b", "key"), ("other", "other"), ("c", "key")):
            streams.append(asyncio.create_task(stream(name, key)))
            await asyncio.sleep(0)
        while not ended:
            await asyncio.sleep(0)
        # Whoever else was fenced has ended by now: fenced at the same moment, woken beside it.
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(*streams)
        # A key without streams is forgotten, and may be used again.
        await stream("d", "key")
        return ended

    assert asyncio.run(join()) == ["a: a newer download took over; this one stops"]


def test_a_streams_own_timeout_is_not_a_fence() -> None:
    """It stays what it is."""

    async def join() -> None:
        async with StreamFence(1).join("key", what="upload"):
            raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(join())


async def messages_of(*messages: bytes) -> AsyncIterator[bytes]:
    """Yield messages."""
    for message in messages:
        yield message


async def nothing() -> AsyncIterator[bytes]:
    """Yield nothing for ever."""
    await asyncio.Event().wait()
    yield b""


def test_a_stream_begins_with_its_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end without one; it may not stay silent."""
    assert asyncio.run(first_message(messages_of(b"header", b"data"))) == b"header"
    assert asyncio.run(first_message(messages_of())) == b""
    monkeypatch.setattr(flow_control, "_FIRST_MESSAGE_S", 0.01)
    with pytest.raises(ServerUnreachable, match="send the header first"):
        asyncio.run(first_message(nothing()))

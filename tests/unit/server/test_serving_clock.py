"""The server's own absence doesn't count against its clients."""

import asyncio

import pytest

from fedserver import runtime
from fedserver.clients.sessions import Sessions
from fedserver.runtime import ServingClock
from tests.factories import make_registration


class Time:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


def test_ordinary_waiting_counts() -> None:
    """Looked at every few seconds it is the clock below it."""
    time = Time()
    serving = ServingClock(time)
    began = serving()
    for _ in range(20):
        time.now += 4
        serving()
    assert serving() - began == 80
    assert serving.away_s == 0


def test_a_lease_outlives_the_servers_absence() -> None:
    """The server was stopped for longer than a lease; afterwards the lease goes on."""
    time = Time()
    serving = ServingClock(time)
    sessions = Sessions([], lease_s=30.0, max_num_examples=1000, clock=serving)
    session, _ = sessions.register(make_registration(0))
    time.now += 300
    assert sessions.is_live(session)
    for _ in range(16):
        time.now += 2
        serving()
    assert not sessions.is_live(session)


def test_an_absence_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the clock hears how long the server was away."""
    monkeypatch.setattr(runtime, "_TICK_S", 0)
    time = Time()
    serving = ServingClock(time)
    absences: list[float] = []

    async def tell(away_s: float) -> None:
        absences.append(away_s)

    async def scene() -> None:
        keeping = asyncio.create_task(serving.keep(tell))
        for seconds in (1, 50, 1, 70, 1):
            time.now += seconds
            for _ in range(3):
                await asyncio.sleep(0)
        keeping.cancel()

    asyncio.run(scene())
    assert absences == [50, 70]

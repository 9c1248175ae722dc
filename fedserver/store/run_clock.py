"""The clock of a run: seconds since it began, which nobody can set back.

Durations are differences of its readings. It goes on while no server runs. After the machine was
started again, or on another machine, it goes on from the last reading on record by what the wall
clock says has passed since.
"""

import functools
import time
import uuid
from pathlib import Path

from sqlalchemy import Connection, select, update

from fedserver.store import schema

_SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def since_boot_s() -> float:
    """Return the seconds since the machine was started."""
    return time.clock_gettime(_SINCE_BOOT)


@functools.cache
def boot_id() -> str:
    """Return a name for this start of the machine, or for this process where there is none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def clock_values() -> dict[str, object]:
    """Return the columns of `runs` for a run's clock that begins now."""
    return {"clock_boot": boot_id(), "clock_zero_s": since_boot_s()}


def read_clock(connection: Connection, run_id: str) -> float:
    """Return the seconds since a run began; for whoever writes, since the clock may move over."""
    runs = schema.runs
    clock = connection.execute(
        select(runs.c.clock_boot, runs.c.clock_zero_s).where(runs.c.run_id == run_id)
    ).one()
    now_s = since_boot_s()
    if clock.clock_boot == boot_id() and clock.clock_zero_s <= now_s:
        return float(now_s - clock.clock_zero_s)
    known_s, known_at = _last_reading(connection, run_id)
    reading_s = known_s + max(0.0, time.time() - known_at)
    connection.execute(
        update(runs)
        .where(runs.c.run_id == run_id)
        .values(clock_boot=boot_id(), clock_zero_s=now_s - reading_s)
    )
    return reading_s


def _last_reading(connection: Connection, run_id: str) -> tuple[float, float]:
    """Return the last reading on record and the wall clock's time of it."""
    runs, rounds = schema.runs, schema.rounds
    orders, updates = schema.orders, schema.updates
    begun_at = connection.execute(select(runs.c.started_at).where(runs.c.run_id == run_id))
    read = [(0.0, begun_at.scalar_one())]
    for reading, at in (
        (rounds.c.opened_s, rounds.c.started_at),
        (rounds.c.closed_s, rounds.c.closed_at),
        (rounds.c.finished_s, rounds.c.finished_at),
    ):
        of_run = select(reading, at).where(rounds.c.run_id == run_id, reading.is_not(None))
        rows = connection.execute(of_run.order_by(reading.desc()).limit(1))
        read += [(row[0], row[1]) for row in rows]
    received = (
        select(updates.c.received_s, updates.c.received_at)
        .join(orders, orders.c.order_id == updates.c.order_id)
        .where(orders.c.run_id == run_id, updates.c.received_s.is_not(None))
        .order_by(updates.c.received_s.desc())
        .limit(1)
    )
    read += [(row[0], row[1]) for row in connection.execute(received)]
    return max(read)

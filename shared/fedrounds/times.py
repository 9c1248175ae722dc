"""Times of the wall clock as text: ISO 8601 with the offset, in UTC; lengths of time as text."""

from datetime import UTC, datetime


def iso_time(at: float, *, timespec: str = "auto") -> str:
    """Return a time, seconds since the epoch, as in 2026-11-30T07:52:20+00:00.

    `timespec` says how finely, as in `datetime.isoformat`.
    """
    return datetime.fromtimestamp(at, UTC).isoformat(timespec=timespec)


def length_text(seconds: float) -> str:
    """Return a length of time as in 8 s, 3 min 20 s, 2 h 5 min or 4 d 3 h."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"

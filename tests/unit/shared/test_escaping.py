"""What the other side says is shown as it is, as far as a terminal and a log can bear it."""

import pytest

from fedrounds.escaping import MAX_CHARACTERS, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("order 7: too few examples, 3 < 5", "order 7: too few examples, 3 < 5"),
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
        ("", ""),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("bad\n2026-11-25 INFO all is well", r"bad\n2026-11-25 INFO all is well"),
        ("over\rwritten\x08\x07\0", r"over\rwritten\x08\x07\x00"),
        ("\x9b2J \u2028 \u202etxt.exe \ud800", r"\x9b2J \u2028 \u202etxt.exe \ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    """Escape sequences, line ends, and signs that turn the direction of what follows."""
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["x" * 5000, "\x1b" * 5000, "x" * 999 + "\x1b"])
def test_no_more_is_shown_than_a_log_bears(text: str) -> None:
    """A thousand characters, counted as they are shown."""
    assert len(printable(text)) == MAX_CHARACTERS

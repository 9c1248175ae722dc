"""Texts from the other side, before they are shown to a person or logged."""

MAX_CHARACTERS = 1000


def printable(text: str) -> str:
    r"""Return a text of somebody else's as one line of at most `MAX_CHARACTERS` that obeys nothing.

    What isn't printable stands escaped (`\x1b`, `\n`), or it could move the cursor, hide what was
    said before, or look like another line of the log.
    """
    escaped = (
        one if one.isprintable() else one.encode("unicode_escape").decode()
        for one in text[:MAX_CHARACTERS]
    )
    return "".join(escaped)[:MAX_CHARACTERS]

"""Escaping of texts from the other side, before they are shown or logged."""

MAX_CHARACTERS = 1000


def printable(text: str) -> str:
    r"""Return an untrusted text as one printable line of at most `MAX_CHARACTERS`.

    Other characters are escaped (`\x1b`, `\n`): they could move the cursor, hide earlier output, or
    look like another line of the log.
    """
    escaped = (
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:MAX_CHARACTERS]
    )
    return "".join(escaped)[:MAX_CHARACTERS]

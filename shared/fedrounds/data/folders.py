"""The folders and files of the user's own data; what is missing is refused with a sentence."""

import os
import stat
from pathlib import Path

from fedrounds.errors import DataUnavailable


def files_under(root: Path, suffix: str) -> list[Path]:
    """Return the files under a folder whose names end with `suffix`, in the order of their paths.

    Raises:
        DataUnavailable: a folder can't be listed, or a file with such a name isn't there.
    """

    def fail(error: OSError) -> None:
        raise error

    try:
        paths = [
            Path(folder, name)
            for folder, _, names in os.walk(root, onerror=fail)
            for name in names
            if name.endswith(suffix)
        ]
        return sorted(path for path in paths if stat.S_ISREG(path.stat().st_mode))
    except OSError as error:
        raise unreadable(error, root) from error


def unreadable(error: OSError, path: Path) -> DataUnavailable:
    """Return the sentence about a file that can't be read; `path` where the error names none."""
    return DataUnavailable(
        f"{error.filename or path} can't be read: {error.strerror}; let this user read it, or pass "
        "--data-root with another folder"
    )

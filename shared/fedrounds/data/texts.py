"""Text files as windows of characters, for a model that predicts each next character."""

import logging
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fedrounds.data.folders import files_under, unreadable
from fedrounds.errors import DataUnavailable, InvalidInput

logger = logging.getLogger(__name__)

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
"""The characters of classes 1, 2, ...: the line end and printable ASCII. All others are class 0.

They are fixed, so that all clients number characters alike.
"""

NUM_CHARACTERS = 1 + len(CHARACTERS)
WINDOW = 64
"""Characters that are predicted in each example."""

_CLASS_OF_ASCII = np.zeros(128, np.int64)
_CLASS_OF_ASCII[[ord(character) for character in CHARACTERS]] = np.arange(1, NUM_CHARACTERS)


def encode_text(text: str) -> NDArray[np.int64]:
    """Return the class of each character, int64 [len(text)] in 0..NUM_CHARACTERS - 1."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.where(codes < 128, _CLASS_OF_ASCII[np.minimum(codes, 127)], 0)


def load_windows(root: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut every `.txt` file under `root`, UTF-8, into windows of WINDOW + 1 characters.

    A window's first WINDOW characters are the input, its last WINDOW what is to be predicted;
    a window begins where the window before it ends, and the last ends with the file. A file shorter
    than a window is left out, and the log says so.

    Returns:
        windows [n, WINDOW + 1], and the number of the file each is from [n], counted over the
        files in the order of their names; both int64.

    Raises:
        DataUnavailable: no text long enough, or a file can't be read.
        InvalidInput: a file isn't UTF-8.
    """
    windows: list[NDArray[np.int64]] = []
    file_numbers: list[NDArray[np.int64]] = []
    for number, path in enumerate(files_under(root, ".txt")):
        try:
            classes = encode_text(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise unreadable(error, path) from error
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
                "convert the file"
            ) from error
        if len(classes) <= WINDOW:
            logger.warning(
                "%s is left out: it has %d characters, and %d are needed",
                *(path, len(classes), WINDOW + 1),
            )
            continue
        starts = np.arange(0, len(classes) - WINDOW, WINDOW)
        if starts[-1] < (last := len(classes) - WINDOW - 1):
            starts = np.append(starts, last)
        windows.append(sliding_window_view(classes, WINDOW + 1)[starts])
        file_numbers.append(np.full(len(starts), number))
    if not windows:
        raise DataUnavailable(
            f"there is no .txt file of {WINDOW + 1} characters or more under {root}; pass "
            "--data-root with the folder of your texts"
        )
    return np.concatenate(windows), np.concatenate(file_numbers)

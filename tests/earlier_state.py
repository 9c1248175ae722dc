"""The state-dirs that an earlier commit's software left behind (tests/fixtures/README.md)."""

import tarfile
from pathlib import Path

_ARCHIVE = Path(__file__).parent / "fixtures" / "state_dirs_b373c5e.tar.xz"

SERVER_FLAGS = (
    *("--batch-size", 8, "--rounds", 3, "--seed", 5),
    *("--min-clients", 2, "--require-all", "--keep-updates", "all"),
)
"""What both runs were started with, beside the task tests.tiny_task:tiny."""

FINISHED, UNFINISHED = 1, 2
"""The runs' numbers."""


def unpack_earlier_state(folder: Path) -> None:
    """Write the folders server, client-0 and client-1 into `folder`."""
    with tarfile.open(_ARCHIVE) as archive:
        archive.extractall(folder, filter="data")

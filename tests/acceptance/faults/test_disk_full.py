"""A disk that is full for a while, at the worst moments: a small one of the test's own (tmpfs).

Where the test may not mount one (only root may), a limit on the size of files stands in for it; it
leaves the database alone. tests/acceptance/test_mistakes.py has the same for every file of a round.
"""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.failpoints import VARIABLE, FailPoint
from tests.acceptance.conftest import CLIENTS, Undisturbed, run_flags
from tests.acceptance.faults.aftermath import FULL, conclude, expect_same_models, now
from tests.acceptance.federation import BIG, expect_clean_exits, start_client, start_server
from tests.processes import Process, Scene, Server, fixed_port, wait_until

DISK_BYTES = 300 << 20
MIB = 1 << 20
ONE_ROUND = ("--rounds", 1)

NO_ROOM = "no room to write in"


class SmallDisk:
    """A file system of its own, mounted on a folder; `fill` and `free` work from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave not one byte."""
        with self._ballast.open("wb", buffering=0) as file:
            for size in (MIB, 4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


@pytest.fixture
def small_disk(scene: Scene, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    """Give a small disk under the folder that the parameter names."""
    folder = scene.folder / str(request.param)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield SmallDisk(folder)
    scene.close()
    subprocess.run(["umount", str(folder)], check=True)


def halted_at(place: FailPoint, *, times: int = 1) -> dict[str, str]:
    """Return the environment of a process that halts there."""
    return {VARIABLE: f"{place}:halt:{times}"}


def start_all(scene: Scene, server: Server, **environment: str) -> list[Process]:
    """Start the clients of the big model; the first has this environment."""
    return [
        start_client(scene, one, server.address, task=BIG, **(environment if one == 0 else {}))
        for one in CLIENTS
    ]


@FULL
@pytest.mark.parametrize("small_disk", ["server"], indirect=True)
@pytest.mark.parametrize(
    "place",
    [
        FailPoint.ROUND_OPENED,
        FailPoint.UPDATE_DURABLE,
        FailPoint.UPDATE_RECORDED,
        FailPoint.ROUND_CLOSING,
        FailPoint.ROUND_CLOSED,
        FailPoint.MODEL_WRITTEN,
        FailPoint.ROUND_DONE,
        FailPoint.EVALUATED,
        FailPoint.RUN_EXPORTED,
    ],
)
def test_the_servers_disk_is_full_from(
    scene: Scene, small_disk: SmallDisk, place: FailPoint, undisturbed: Undisturbed
) -> None:
    """It waits for room or ends with a sentence; with room, the same command ends the run."""
    port = fixed_port()
    flags = [*run_flags(BIG, port), *ONE_ROUND]
    server = start_server(scene, *flags, task=BIG, **halted_at(place))
    clients = start_all(scene, server)
    wait_until(lambda: server.is_halted, what="the server to be halted")
    small_disk.fill()
    server.signal(signal.SIGCONT)
    server.wait_for_line("room|full")
    struck_at = now()
    has_ended = not server.is_running
    small_disk.free()
    if has_ended:
        assert server.wait() == 1
        assert server.count_lines("Traceback") == 0
        server = start_server(scene, *flags, task=BIG)
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    seen = ["ended with a sentence, started again" if has_ended else "waited"]
    conclude(scene, fault=f"the server's disk full from {place}", struck_at=struck_at, seen=seen)

"""A full disk for a while, from the worst moments on: a small one of the test's own (tmpfs).

Only root may mount one; elsewhere these are skipped, and tests/acceptance/test_mistakes.py has a
limit on the size of files in their place, which leaves the database alone.
"""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from tests.acceptance.conftest import CLIENTS, Undisturbed, run_flags
from tests.acceptance.faults.aftermath import conclude, expect_same_models, now
from tests.acceptance.faults.test_fail_points import SERVER_FAIL_POINTS
from tests.acceptance.federation import BIG, expect_clean_exits, start_client, start_server
from tests.processes import Process, Scene, fixed_port, wait_until
from tests.tiers import FULL

DISK_BYTES = 300 << 20
MIB = 1 << 20
NO_ROOM = "no room to write in|out of disk space|disk-full"

CLIENT_FAIL_POINTS = [FailPoint.ORDER_PULLED, FailPoint.MODEL_FETCHED, FailPoint.TRAINED]
"""After these a client writes."""

pytestmark = FULL


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


def fill_at(fail_point: FailPoint, process: Process, disk: SmallDisk) -> None:
    """Fill the disk of a process that is armed to halt at a fail point; returns when it says so."""
    wait_until(lambda: process.is_halted, what=f"{process.name} to be halted at {fail_point}")
    disk.fill()
    process.signal(signal.SIGCONT)
    process.wait_for_line(NO_ROOM)


@pytest.mark.parametrize("small_disk", ["server"], indirect=True)
@pytest.mark.parametrize("fail_point", SERVER_FAIL_POINTS)
def test_the_servers_disk_is_full_from(
    scene: Scene, small_disk: SmallDisk, fail_point: FailPoint, undisturbed: Undisturbed
) -> None:
    """It waits for room, says so, and ends the run by itself."""
    flags = [*run_flags(BIG, fixed_port()), "--rounds", 1, "--min-free-bytes", 0]
    flags += ["--keep-updates", "all"]  # deleting them would give room
    armed = {VARIABLE: f"{fail_point}:halt"}
    server = start_server(scene, *flags, task=BIG, **armed)
    clients = [start_client(scene, client_id, server.address, task=BIG) for client_id in CLIENTS]
    fill_at(fail_point, server, small_disk)
    assert server.is_running
    struck_at = now()
    small_disk.free()
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault=f"the server's disk full from {fail_point} on",
        struck_at=struck_at,
        seen=["waited for room"],
    )


@pytest.mark.parametrize("small_disk", ["client-0"], indirect=True)
@pytest.mark.parametrize("fail_point", CLIENT_FAIL_POINTS)
def test_a_clients_disk_is_full_from(
    scene: Scene, small_disk: SmallDisk, fail_point: FailPoint, undisturbed: Undisturbed
) -> None:
    """It waits for room, says so, and delivers the same order."""
    server = start_server(scene, *run_flags(BIG, 0), "--rounds", 1, task=BIG)
    armed = {VARIABLE: f"{fail_point}:halt"}
    victim = start_client(scene, 0, server.address, task=BIG, **armed)
    others = [start_client(scene, client_id, server.address, task=BIG) for client_id in CLIENTS[1:]]
    fill_at(fail_point, victim, small_disk)
    assert victim.count_lines("no answer") == 0, "it is the client's disk, not the server"
    struck_at = now()
    small_disk.free()
    expect_clean_exits(server, victim, *others)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault=f"a client's disk full from {fail_point} on",
        struck_at=struck_at,
        seen=["waited for room"],
        client_id=0,
    )

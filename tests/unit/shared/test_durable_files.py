"""What must survive a loss of power is synced, also on systems without Linux's call for that."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from fedrounds.files import replace_file
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints
from fedserver.updates.spool import Spool

F_FULLFSYNC = 51
"""Its number in macOS' sys/fcntl.h."""


@pytest.fixture(params=["Linux", "macOS", "macOS, a share without F_FULLFSYNC"])
def synced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Give the inodes that were synced, on a system of this kind."""
    inodes: set[int] = set()

    def sync(descriptor: int) -> None:
        inodes.add(os.fstat(descriptor).st_ino)

    if request.param == "Linux":
        monkeypatch.setattr(os, "fdatasync", sync)
        return inodes

    def control(descriptor: int, command: int) -> int:
        assert command == F_FULLFSYNC
        if "share" in request.param:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        sync(descriptor)
        return 0

    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    return inodes


def test_replaced_files_spooled_updates_and_models_are_synced(
    synced: set[int], tmp_path: Path
) -> None:
    """Each by the call that this system has."""
    replace_file(tmp_path / "key", b"secret", survive_power_loss=True)
    spool = Spool(tmp_path / "spool")
    with spool.open_stream("order", "ab" * 32, offset=0) as stream:
        stream.append(memoryview(b"update"))
        stream.make_durable()
    checkpoints = Checkpoints(tmp_path / "models", {"w": EntryKind.PARAMETER})
    model = checkpoints.save_initial({"w": torch.zeros(3)})
    files = [tmp_path / "key", spool.path("order", "ab" * 32), checkpoints.path(model.digest)]
    assert {path.stat().st_ino for path in files} <= synced


def test_a_sync_that_fails_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only a system that doesn't know the call gets another call."""

    def fail(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_file(tmp_path / "key", b"secret", survive_power_loss=True)

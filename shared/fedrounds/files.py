"""Atomic and durable writing of files, and the locked folder of a process."""

import ctypes
import errno
import fcntl
import logging
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedrounds.errors import InvalidInput, Locked, OutOfFiles, OutOfSpace, StorageUnusable

logger = logging.getLogger(__name__)

_OURS_ALONE = 0o700
_NOT_SUPPORTED = {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_NEEDS_A_PERSON = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}

WRITE_BACK_BYTES = 8 << 20
"""The number of bytes for which `begin_write_back` is worth a call."""

_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def exhaustion(error: OSError, *, folder: Path | None = None) -> OutOfSpace | None:
    """Return the error to raise for an OSError if a resource is used up, else None.

    The resource is room on a disk (OutOfSpace), in `folder` if known, or the file descriptors of
    this process or machine (OutOfFiles).
    """
    if error.errno in _FULL:
        return out_of_space(folder or error.filename or "a folder", error.strerror or "full")
    if error.errno in _NO_DESCRIPTORS:
        return OutOfFiles(
            f"no further file can be opened ({error.strerror}; this process may have "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}); raise the limit with `ulimit -n`"
        )
    return None


def out_of_space(folder: Path | str, finding: str) -> OutOfSpace:
    """Return the error to raise for a full disk; `finding` is the system's text."""
    return OutOfSpace(
        f"no room to write in {folder} ({finding}); free some space: nothing acknowledged is lost"
    )


def unusable(error: OSError) -> StorageUnusable | None:
    """Return the error to raise for an OSError if only a person can fix it, else None.

    Examples are a missing permission, a read-only disk, or a wrong file or folder. Other errors may
    pass by themselves: a network drive may come back.
    """
    if error.errno not in _NEEDS_A_PERSON:
        return None
    return StorageUnusable(
        f"{error.filename or 'a file of the state-dir'} can't be used ({error.strerror}), which "
        "doesn't pass by itself: let this user read and write it, or put back what belongs there, "
        "then start the same command again; nothing acknowledged is lost"
    )


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raise the error that `exhaustion` returns for an OSError in the block; others pass."""
    try:
        yield
    except OSError as error:
        if (named := exhaustion(error, folder=folder)) is not None:
            raise named from error
        raise


def out_of_files() -> OutOfSpace | None:
    """Return OutOfFiles if no file can be opened now; some libraries hide why they fail."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return exhaustion(error)
    return None


def raise_file_limit() -> None:
    """Raise the soft limit on open files to the hard limit.

    Each connection and each update under way takes a descriptor; 1024 is the usual soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            # macOS has a bound of its own below an unlimited hard limit.
            logger.debug("the limit on open files stays %d: %s", soft, error)


def begin_write_back(descriptor: int, *, offset: int, count: int) -> None:
    """Let the operating system begin to write a part of a file to the disk, without waiting.

    It shortens a later sync_file of a large file, and guarantees nothing by itself. On systems
    without this call it does nothing.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


def sync_file(descriptor: int) -> None:
    """Wait until the content of an open file survives a power loss.

    macOS has no fdatasync, and its fsync stops at the drive's cache: F_FULLFSYNC goes on, unless
    the file system doesn't know it (fsync(2) and fcntl(2) of macOS).
    """
    if (full_sync := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of `folder` (new and renamed files) survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, *parts: bytes | memoryview, survive_power_loss: bool) -> None:
    """Write the parts to `path` so that a reader finds the old content or the new, never a mix.

    With `survive_power_loss` the content is on the disk when this returns. Without it, the content
    survives a crash of the process only.

    Raises:
        OutOfSpace: the disk is full; the old content stands.
    """
    draft = path.with_name(path.name + ".draft")
    with naming_full_disk(path.parent):
        with draft.open("wb") as file:
            file.writelines(parts)
            if survive_power_loss:
                file.flush()
                sync_file(file.fileno())
        draft.replace(path)
        if survive_power_loss:
            sync_folder(path.parent)


@contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Create `folder` if it doesn't exist and hold its lock; the lock ends with the process.

    Other users must not read it: with the id of a session or an instance key they could act as that
    client, and a personal model reveals something of its training data.

    Raises:
        InvalidInput: the folder can't be created or written to.
        Locked: another process holds it.
    """
    try:
        folder.mkdir(mode=_OURS_ALONE, parents=True, exist_ok=True)
        _keep_others_out(folder)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise Locked(
            f"the state-dir {folder} is in use by another process; stop that process "
            "or give this one another --state-dir"
        ) from None
    except OSError as error:
        raise InvalidInput(
            f"the state-dir {folder} can't be used ({error.strerror}); "
            "give a folder that can be written to with --state-dir"
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def _keep_others_out(folder: Path) -> None:
    """Remove the access of all users that an older version, or `mkdir`, has left.

    A folder that only a group may read was shared on purpose. A sticky bit marks a folder that
    belongs to everybody, such as /tmp.
    """
    status = folder.stat()
    if not status.st_mode & stat.S_IRWXO:
        return
    if status.st_uid == os.geteuid() and not status.st_mode & stat.S_ISVTX:
        try:
            folder.chmod(_OURS_ALONE)
        except PermissionError:
            pass  # a file system without modes
        else:
            logger.warning(
                "everybody on this machine could look into the state-dir %s: only you can now; "
                "to share it, chmod it to 750",
                folder,
            )
            return
    logger.warning(
        "everybody on this machine can look into the state-dir %s, which holds keys of sessions; "
        "use a folder of your own",
        folder,
    )

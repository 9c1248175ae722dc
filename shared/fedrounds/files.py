"""Files that are whole or not there, and the locked folder of a process."""

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
"""How much is worth to begin with at a time."""

_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def exhaustion(error: OSError, *, folder: Path | None = None) -> OutOfSpace | None:
    """Return what an error of the operating system means if something is used up, else None.

    That is room on a disk (OutOfSpace), in `folder` where it is known, or the file descriptors of
    this process or machine (OutOfFiles).
    """
    if error.errno in _FULL:
        where = folder or error.filename or "a folder"
        return OutOfSpace(
            f"no room to write in {where} ({error.strerror}); free some space: "
            "nothing acknowledged is lost"
        )
    if error.errno in _NO_DESCRIPTORS:
        return OutOfFiles(
            f"no further file can be opened ({error.strerror}; this process may have "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}); raise the limit with `ulimit -n`"
        )
    return None


def unusable(error: OSError) -> StorageUnusable | None:
    """Return what an error of the operating system means if only a person can mend it, else None.

    That is a right that this process lacks, a read-only disk, or something else than the file or
    folder that belongs there. Other errors may pass by themselves: a network drive may come back.
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
    """Raise what `exhaustion` makes of an OSError in the block; other errors pass."""
    try:
        yield
    except OSError as error:
        if (named := exhaustion(error, folder=folder)) is not None:
            raise named from error
        raise


def out_of_files() -> OutOfSpace | None:
    """Return OutOfFiles if no file can be opened now: some libraries don't say why they fail."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return exhaustion(error)
    return None


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it: the soft limit becomes the hard.

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

    So that a later sync_file of a large file has little left to wait for; it promises nothing by
    itself. Where the system doesn't offer it nothing happens.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


def sync_file(descriptor: int) -> None:
    """Return when the content of an open file survives a loss of power.

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
    """Return when the entries of `folder` (new and renamed files) survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, *parts: bytes | memoryview, survive_power_loss: bool) -> None:
    """Write the parts to `path` so that a reader finds the old content or the new, never a mix.

    With `survive_power_loss` the content is on the disk when this returns; without, it survives
    the death of the process only.

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
    """Make `folder` if it isn't there and hold its lock; the lock ends with the process.

    Nobody else may look into it: who reads the id of a session or an instance key can pass for that
    client, and a personal model tells of the data it was trained on.

    Raises:
        InvalidInput: the folder can't be made or written to.
        Locked: another process holds it.
    """
    try:
        folder.mkdir(mode=_OURS_ALONE, parents=True, exist_ok=True)
        _keep_others_out(folder)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise Locked(
            f"the state-dir {folder} is in use by another process; stop that one "
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
    """Take away what an older version, or `mkdir`, left everybody: to look into a folder.

    One that is open to a group alone was shared on purpose. A sticky bit says that a folder is
    everybody's, as /tmp is.
    """
    found = folder.stat()
    if not found.st_mode & stat.S_IRWXO:
        return
    if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:
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

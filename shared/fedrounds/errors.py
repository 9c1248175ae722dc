"""Every error of the service.

    FederationError
    +- InvalidInput          INVALID_ARGUMENT     a mistake of the caller's; also a ValueError
    |  +- CorruptPayload     DATA_LOSS, retry     the bytes are not those of the digest
    |  +- WrongSettings      FAILED_PRECONDITION  the state-dir or the client belongs to another run
    +- OwnCodeFailed         FAILED_PRECONDITION  a task's own code raised an error
    +- DataUnavailable       FAILED_PRECONDITION  a data set can't be had
    +- NotFound              NOT_FOUND            no such order, blob, round or run
    |  +- UnknownSession     UNAUTHENTICATED      register again
    +- ClientIdTaken         ALREADY_EXISTS       another instance holds this client id
    |  +- StateDirCopied     ALREADY_EXISTS       another process uses a copy of the state-dir
    +- StreamFenced          ABORTED              a newer upload of the same order took over
    +- WrongOffset           OUT_OF_RANGE         ask QueryUpload where to go on
    +- OutOfSpace            RESOURCE_EXHAUSTED, retry
    |  +- OutOfFiles         RESOURCE_EXHAUSTED, retry   no further file can be opened
    +- StorageDamaged        INTERNAL             the store or a blob is not what was written
    +- StorageUnusable       INTERNAL             a file of ours may not be used, or is gone
    +- Locked                FAILED_PRECONDITION  another process works in this state-dir
    +- RunFailed             ABORTED              the run can't go on
    +- TaskFailed            FAILED_PRECONDITION  the task's own code failed for some clients
    +- NoAnswer              UNAVAILABLE          the server didn't answer for too long
    +- ProxyRefused          FAILED_PRECONDITION  a proxy on the way lets no such call through
    +- ServerUnreachable     UNAVAILABLE, retry

`status` is the name of the gRPC status code that carries the error; `retry` says whether the
same call may succeed later without a person's help. A message says what happened (with the
values), to which item, and what to do.
"""

from typing import ClassVar


class FederationError(Exception):
    """The root of all errors that the service raises on purpose."""

    status: ClassVar[str] = "INTERNAL"
    retry: ClassVar[bool] = False


class InvalidInput(FederationError, ValueError):
    """A setting, an argument or a message is wrong; the message says which and what to type."""

    status = "INVALID_ARGUMENT"


class CorruptPayload(InvalidInput):
    """The bytes that arrived are not those the digest names; send them again from the start."""

    status = "DATA_LOSS"
    retry = True


class WrongSettings(InvalidInput):
    """What is already there was made with other settings; the message says which differ."""

    status = "FAILED_PRECONDITION"


class OwnCodeFailed(FederationError):
    """A task's own code raised an error, which is the `__cause__`; this side alone shows it.

    The text of that error may hold private data: it never goes over the wire.
    """

    status = "FAILED_PRECONDITION"


class DataUnavailable(FederationError):
    """A data set can't be had; the message names the ways to get it."""

    status = "FAILED_PRECONDITION"


class NotFound(FederationError):
    """The order, blob, round or run named doesn't exist."""

    status = "NOT_FOUND"


class UnknownSession(NotFound):
    """The server doesn't know this session; register again."""

    status = "UNAUTHENTICATED"


class ClientIdTaken(FederationError):
    """Another instance holds this client id until its lease ends; choose another id or stop it."""

    status = "ALREADY_EXISTS"


class StateDirCopied(ClientIdTaken):
    """Another process uses a copy of the client's state-dir at the same time; stop one of them."""


class StreamFenced(FederationError):
    """A newer upload of the same order took over; this upload stops."""

    status = "ABORTED"


class WrongOffset(FederationError):
    """The offset isn't what is committed; ask QueryUpload and go on from there."""

    status = "OUT_OF_RANGE"


class OutOfSpace(FederationError):
    """The disk is full; nothing acknowledged is lost, and the call may be repeated."""

    status = "RESOURCE_EXHAUSTED"
    retry = True


class OutOfFiles(OutOfSpace):
    """No further file can be opened; waited out as a full disk is, and the call may be repeated."""


class StorageDamaged(FederationError):
    """The store or a blob on disk isn't what was written; nothing is deleted."""


class StorageUnusable(FederationError):
    """A file of this process may not be used, or isn't there; waiting doesn't mend it."""


class Locked(FederationError):
    """Another process works in this state-dir; stop it or choose another one."""

    status = "FAILED_PRECONDITION"


class RunFailed(FederationError):
    """The run can't go on; the message says why and what would help."""

    status = "ABORTED"


class TaskFailed(FederationError):
    """The task's own code failed for some clients of a process; its errors are in the log."""

    status = "FAILED_PRECONDITION"


class ProxyRefused(FederationError):
    """An HTTP proxy on the way refuses a call for good; the message says what to change."""

    status = "FAILED_PRECONDITION"


class NoAnswer(FederationError):
    """The server hasn't answered for so long that the client ends; start it again later."""

    status = "UNAVAILABLE"


class ServerUnreachable(FederationError):
    """The server doesn't answer; try again later."""

    status = "UNAVAILABLE"
    retry = True

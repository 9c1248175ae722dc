"""Updates kept out of the global model, with their bytes, for a person to look at.

The store says what is held and why; the folder holds the payloads, at most `max_bytes` of them: the
oldest make room for the newest.
"""

from collections.abc import Iterable
from pathlib import Path

from fedserver.records import HeldState, HeldUpdate
from fedserver.updates.spool import Spool, update_path


class QuarantineFolder:
    """Owns the folder. Its methods block on the disk, but for `path` and `excess`."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes

    def path(self, order_id: str, digest: str) -> Path:
        """Return the path of an update's payload while it is held."""
        return update_path(self._folder, order_id, digest)

    def drop(self, held: HeldUpdate) -> None:
        """Delete the payload of an update, if it is there."""
        self.path(held.order_id, held.digest).unlink(missing_ok=True)

    def fill(self, known: Iterable[HeldUpdate], spool: Spool) -> None:
        """Move in the payloads of updates HELD that are still in the spool and aren't written."""
        for held in known:
            if held.state is HeldState.HELD:
                spool.move_out(held.order_id, held.digest, self.path(held.order_id, held.digest))

    def tidy(self, known: Iterable[HeldUpdate]) -> None:
        """Delete the files of no update HELD; only while nothing comes in."""
        kept = {
            self.path(held.order_id, held.digest) for held in known if held.state is HeldState.HELD
        }
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink(missing_ok=True)

    def excess(self, known: Iterable[HeldUpdate]) -> list[HeldUpdate]:
        """Return the oldest updates HELD, without which the payloads of the others fit.

        `known` is in the order in which they were held.
        """
        held = [update for update in known if update.state is HeldState.HELD and update.kept_bytes]
        excess_bytes = sum(update.kept_bytes for update in held) - self._max_bytes
        oldest = []
        for update in held:
            if excess_bytes <= 0:
                break
            excess_bytes -= update.kept_bytes
            oldest.append(update)
        return oldest

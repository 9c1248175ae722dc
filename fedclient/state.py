"""What one client keeps from one order to the next, such as a remedy in force.

It is kept under the order whose update it goes with, and only that of the last order which was
COUNTED is ever in force: the server names it with every new order, so that a LATE, REFUSED or
repeated round can't make the two sides disagree. What was in force before it is kept too: a round
that is rolled back makes an order that was counted count no more, and the one before is named.
"""

import json
from pathlib import Path

from shared.doctor.easing import Convalescence
from shared.errors import InvalidInput
from shared.files import replace_file


class StateLost(InvalidInput):
    """What was kept with the last counted order is gone or damaged; work begins without it."""


class ClientStates:
    """Owns one client's folder: one file an order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def keep(self, order_id: str, state: Convalescence, *, follows: str) -> None:
        """Keep a state until another order is counted; before its update is put into the outbox.

        `follows` is the order that was the last one counted when this one was given.

        Raises:
            OutOfSpace: the disk is full.
        """
        content = json.dumps({"follows": follows, "state": state.as_json()}).encode()
        replace_file(self._path(order_id), content, survive_power_loss=False)

    def promoted(self, last_counted_order_id: str) -> Convalescence:
        """Return what is in force, and forget what other orders left.

        Before the first order is counted that is nothing.

        Raises:
            StateLost: it was kept here and isn't whole any more, or never was kept here.
        """
        if not last_counted_order_id:
            self._forget_all_but()
            return Convalescence()
        try:
            kept = json.loads(self._path(last_counted_order_id).read_bytes())
            follows, state = kept["follows"], Convalescence.from_json(kept["state"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            self._forget_all_but()
            raise StateLost(
                f"what was kept with order {last_counted_order_id} is lost ({error}); "
                "a remedy that was in force isn't any more"
            ) from error
        self._forget_all_but(last_counted_order_id, follows)
        return state

    def _forget_all_but(self, *order_ids: str) -> None:
        kept = {self._path(one) for one in order_ids}
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink()

    def _path(self, order_id: str) -> Path:
        return self._folder / f"{order_id}.json"

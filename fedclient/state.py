"""What one client keeps from one order to the next: a remedy, a rule's tensors, a residual.

It is kept under the order whose update it goes with, and only that of the last order which was
COUNTED is ever in force: the server names it with every new order, so that a LATE, REFUSED or
repeated round can't make the two sides disagree. What was in force before it is kept too: a round
that is rolled back makes an order that was counted count no more, and the one before is named.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from shared.codec import decode_state, digest_bytes, encode_state
from shared.doctor.easing import Convalescence
from shared.errors import InvalidInput
from shared.files import replace_file

Tensors = Mapping[str, Tensor]


class StateLost(InvalidInput):
    """What was kept with the last counted order is gone or damaged; work begins without it."""


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """What is in force: a treatment that lasts, and tensors by what they are kept for."""

    convalescence: Convalescence = field(default_factory=Convalescence)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


class ClientStates:
    """Owns one client's folder: one file an order, and beside it one for each name of tensors."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def keep(self, order_id: str, state: ClientState, *, follows: str) -> None:
        """Keep a state until another order is counted; before its update is put into the outbox.

        `follows` is the order that was the last one counted when this one was given.

        Raises:
            OutOfSpace: the disk is full.
        """
        digests = {}
        for name, tensors in state.tensors.items():
            content = encode_state(tensors)
            digests[name] = digest_bytes(content)
            replace_file(self._tensors_path(order_id, name), content, survive_power_loss=False)
        described = {
            "follows": follows,
            "state": state.convalescence.as_json(),
            "tensors": digests,
        }
        # Written last: with it the state is there.
        content = json.dumps(described).encode()
        replace_file(self._path(order_id), content, survive_power_loss=False)

    def promoted(self, last_counted_order_id: str) -> ClientState:
        """Return what is in force, and forget what other orders left.

        Before the first order is counted that is nothing.

        Raises:
            StateLost: it was kept here and isn't whole any more, or never was kept here.
        """
        if not last_counted_order_id:
            self._forget_all_but()
            return ClientState()
        try:
            kept = json.loads(self._path(last_counted_order_id).read_bytes())
            follows = kept["follows"]
            state = ClientState(
                convalescence=Convalescence.from_json(kept["state"]),
                tensors={
                    name: self._read_tensors(last_counted_order_id, name, digest)
                    for name, digest in kept["tensors"].items()
                },
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._forget_all_but()
            raise StateLost(
                f"what was kept with order {last_counted_order_id} is lost ({error}); "
                "a remedy that was in force isn't any more, and a local rule begins anew"
            ) from error
        self._forget_all_but(last_counted_order_id, follows)
        return state

    def _read_tensors(self, order_id: str, name: str, digest: str) -> Tensors:
        path = self._tensors_path(order_id, name)
        content = path.read_bytes()
        if digest_bytes(content) != digest:
            raise InvalidInput(f"{path.name} holds other bytes than were written")
        return decode_state(content)

    def _forget_all_but(self, *order_ids: str) -> None:
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] not in order_ids:
                path.unlink()

    def _path(self, order_id: str) -> Path:
        return self._folder / f"{order_id}.json"

    def _tensors_path(self, order_id: str, name: str) -> Path:
        return self._folder / f"{order_id}.{name}.safetensors"

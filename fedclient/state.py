"""The state that a client keeps between orders: a remedy, a client algorithm's tensors, a residual.

A state is kept under the order whose update it belongs to. Only the state of the last order that
was COUNTED is in force. The server names that order with every new order, so that a LATE, REFUSED
or repeated round can't make the two sides disagree. The state in force before it is kept too: if a
round is rolled back, its order no longer counts, and the server names the order before.

States are deleted only to save room, since a state that the server doesn't name is never in force.
An order that names no state here, or another run, leaves the newest states where they are: they may
be a personal model of months, and that order may be a mistake.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedrounds.doctor.remedy_decay import RemedyDecay
from fedrounds.errors import InvalidInput
from fedrounds.files import replace_file
from fedrounds.tensors.codec import decode_state, digest_bytes, encode_state

Tensors = Mapping[str, Tensor]

_NUM_OF_THIS_RUN = 2
_NUM_OF_OTHER_RUNS = 3
"""The number of states that a run leaves: the last in force, the state before, and the next."""


class StateLost(InvalidInput):
    """The state of the last counted order is gone or damaged; work begins without it."""


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """A client's state: remedies that last, and tensors by the purpose they are kept for."""

    remedy_decay: RemedyDecay = field(default_factory=RemedyDecay)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


class ClientStates:
    """Owns one client's folder: a JSON file for each order, and a file for each of its tensors.

    `run_id` is the run of the orders that the client works on.
    """

    def __init__(self, folder: Path, *, run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._run_id = run_id

    def keep(self, order_id: str, state: ClientState, *, follows: str) -> None:
        """Keep the state of an order; call it before the update goes into the outbox.

        `follows` is the last counted order at the time when the server gave this order.

        Raises:
            OutOfSpace: the disk is full.
        """
        digests = {}
        for name, tensors in state.tensors.items():
            content = encode_state(tensors)
            digests[name] = digest_bytes(content)
            replace_file(self._tensors_path(order_id, name), content, survive_power_loss=False)
        description = {
            "run": self._run_id,
            "follows": follows,
            "state": state.remedy_decay.as_json(),
            "tensors": digests,
        }
        # Written last: the state exists once this file does.
        content = json.dumps(description).encode()
        replace_file(self._path(order_id), content, survive_power_loss=False)

    def promoted(self, last_counted_order_id: str) -> ClientState:
        """Return the state in force, and delete states of the run's other orders.

        Before the first order is counted, the state is empty. If no state is in force, the newest
        states of the run stay. The newest states of other runs always stay.

        Raises:
            StateLost: the state is damaged, or was never kept here.
        """
        if not last_counted_order_id:
            self._make_room()
            return ClientState()
        try:
            kept = json.loads(self._path(last_counted_order_id).read_bytes())
            follows = str(kept["follows"])
            state = ClientState(
                remedy_decay=RemedyDecay.from_json(kept["state"]),
                tensors={
                    name: self._read_tensors(last_counted_order_id, name, digest)
                    for name, digest in kept["tensors"].items()
                },
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._make_room()
            raise StateLost(
                f"the state kept with order {last_counted_order_id} is lost ({error}); "
                "remedies are no longer in force, and a client algorithm begins anew"
            ) from error
        self._make_room(last_counted_order_id, follows)
        return state

    def _read_tensors(self, order_id: str, name: str, digest: str) -> Tensors:
        path = self._tensors_path(order_id, name)
        content = path.read_bytes()
        if digest_bytes(content) != digest:
            raise InvalidInput(f"{path.name} holds other bytes than were written")
        return decode_state(content)

    def _make_room(self, *in_force: str) -> None:
        newest_first = sorted(
            self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        own = [path.stem for path in newest_first if self._is_of_this_run(path)]
        others = [path.stem for path in newest_first if path.stem not in own]
        staying = {*(in_force or own[:_NUM_OF_THIS_RUN]), *others[:_NUM_OF_OTHER_RUNS]}
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] not in staying:
                path.unlink()

    def _is_of_this_run(self, path: Path) -> bool:
        try:
            return bool(json.loads(path.read_bytes())["run"] == self._run_id)
        except (OSError, ValueError, LookupError, TypeError):
            # Damaged, or of an older version.
            return False

    def _path(self, order_id: str) -> Path:
        return self._folder / f"{order_id}.json"

    def _tensors_path(self, order_id: str, name: str) -> Path:
        return self._folder / f"{order_id}.{name}.safetensors"

"""What one client keeps from one order to the next: a remedy, a rule's tensors, a residual.

It is kept under the order whose update it goes with, and only that of the last order which was
COUNTED is ever in force: the server names it with every new order, so that a LATE, REFUSED or
repeated round can't make the two sides disagree. What was in force before it is kept too: a round
that is rolled back makes an order that was counted count no more, and the one before is named.

What is forgotten is a matter of room alone, since nothing that isn't named is ever in force. So an
order that names nothing that is here, and another run, leave the newest states where they are: they
may be a personal model of months, and that order a mistake or worse.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedrounds.doctor.remedy_decay import Convalescence
from fedrounds.errors import InvalidInput
from fedrounds.files import replace_file
from fedrounds.tensors.codec import decode_state, digest_bytes, encode_state

Tensors = Mapping[str, Tensor]

_NUM_OF_THIS_RUN = 2
_NUM_OF_OTHER_RUNS = 3
"""As many as a run leaves: what was in force last, what was before it, what was to follow."""


class StateLost(InvalidInput):
    """What was kept with the last counted order is gone or damaged; work begins without it."""


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """What is in force: a treatment that lasts, and tensors by what they are kept for."""

    convalescence: Convalescence = field(default_factory=Convalescence)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


class ClientStates:
    """Owns one client's folder: one file an order, and beside it one for each name of tensors.

    `run_id` is the run whose orders are worked on.
    """

    def __init__(self, folder: Path, *, run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._run_id = run_id

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
            "run": self._run_id,
            "follows": follows,
            "state": state.convalescence.as_json(),
            "tensors": digests,
        }
        # Written last: with it the state is there.
        content = json.dumps(described).encode()
        replace_file(self._path(order_id), content, survive_power_loss=False)

    def promoted(self, last_counted_order_id: str) -> ClientState:
        """Return what is in force, and forget what other orders of the run left.

        Before the first order is counted that is nothing. Where nothing is in force the newest of
        the run's states stay, and the newest of other runs' always.

        Raises:
            StateLost: it was kept here and isn't whole any more, or never was kept here.
        """
        if not last_counted_order_id:
            self._make_room()
            return ClientState()
        try:
            kept = json.loads(self._path(last_counted_order_id).read_bytes())
            follows = str(kept["follows"])
            state = ClientState(
                convalescence=Convalescence.from_json(kept["state"]),
                tensors={
                    name: self._read_tensors(last_counted_order_id, name, digest)
                    for name, digest in kept["tensors"].items()
                },
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._make_room()
            raise StateLost(
                f"what was kept with order {last_counted_order_id} is lost ({error}); "
                "a remedy that was in force isn't any more, and a client algorithm begins anew"
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

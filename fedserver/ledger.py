"""One entry a finished round, chained by digest: what went in, what came out.

A round that is rolled back has a second entry, which says so; its repetition has an entry of its
own. An entry is canonical JSON; this module alone makes and reads it.

The chain finds accidents (a flipped bit, a changed or missing row). Against somebody who can
rewrite the whole store it proves nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from fedrounds.types import Encoding

GENESIS = "0" * 64
"""What the first entry has in place of the digest of the entry before."""


@dataclass(frozen=True, kw_only=True)
class LedgerUpdate:
    """What became of one update of an attempt; `verdict` is the state of its order.

    `base_digest` and `staleness` are of an update that began with the model of an earlier round:
    that model, and the number of rounds between. `sections` are names and sizes in bytes of a
    payload of more than the model; empty: the model is all. `delta_norm` is None for an update
    that was refused before it was measured.
    """

    order_id: str
    client_id: int
    num_examples: int
    num_steps: int
    global_loss: float | None
    digest: str
    encoding: str
    delta_norm: float | None
    verdict: str
    base_digest: str | None = None
    staleness: int = 0
    sections: tuple[tuple[str, int], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object that an entry holds."""
        own_base = {"base": self.base_digest, "staleness": self.staleness}
        return {
            "order_id": self.order_id,
            "client": self.client_id,
            "num_examples": self.num_examples,
            "num_steps": self.num_steps,
            "global_loss": self.global_loss,
            "digest": self.digest,
            "encoding": self.encoding,
            "delta_norm": self.delta_norm,
            "verdict": self.verdict,
            **(own_base if self.base_digest is not None else {}),
            **({"sections": self.sections} if self.sections else {}),
        }


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """The entry of a round that is done.

    The states are the server's, beside base and model. `settings` are the run's as recorded,
    `adjustments` what of them was changed for the attempt. `updates` are in the order of
    aggregation. `previous` is the digest of the entry before, GENESIS for the first.
    """

    run_id: str
    round_number: int
    attempt: int
    base_digest: str
    base_state_digest: str | None
    model_digest: str
    state_digest: str | None
    settings: Mapping[str, Any]
    adjustments: Mapping[str, Any]
    updates: Sequence[LedgerUpdate]
    previous: str

    def to_bytes(self) -> bytes:
        """Return the entry as canonical JSON.

        Raises:
            ValueError: it holds a number that JSON lacks.
        """
        return _canonical(
            {
                "run": self.run_id,
                "round": self.round_number,
                "attempt": self.attempt,
                "base": self.base_digest,
                "base_state": self.base_state_digest,
                "model": self.model_digest,
                "state": self.state_digest,
                "settings": self.settings,
                "adjustments": self.adjustments,
                "updates": [update.as_json() for update in self.updates],
                "previous": self.previous,
            }
        )


@dataclass(frozen=True, kw_only=True)
class RollbackEntry:
    """The entry that takes a round's model back for its base."""

    run_id: str
    round_number: int
    attempt: int
    base_digest: str
    model_digest: str
    previous: str

    def to_bytes(self) -> bytes:
        """Return the entry as canonical JSON."""
        return _canonical(
            {
                "run": self.run_id,
                "round": self.round_number,
                "attempt": self.attempt,
                "rolled_back": self.model_digest,
                "to": self.base_digest,
                "previous": self.previous,
            }
        )


def read_entry(text: str) -> LedgerEntry | RollbackEntry:
    """Return the entry that canonical JSON holds."""
    entry = json.loads(text)
    if "rolled_back" in entry:
        return RollbackEntry(
            run_id=entry["run"],
            round_number=entry["round"],
            attempt=entry["attempt"],
            base_digest=entry["to"],
            model_digest=entry["rolled_back"],
            previous=entry["previous"],
        )
    return LedgerEntry(
        run_id=entry["run"],
        round_number=entry["round"],
        attempt=entry["attempt"],
        base_digest=entry["base"],
        base_state_digest=entry["base_state"],
        model_digest=entry["model"],
        state_digest=entry["state"],
        settings=entry["settings"],
        adjustments=entry["adjustments"],
        updates=[_read_update(update) for update in entry["updates"]],
        previous=entry["previous"],
    )


def _read_update(update: Mapping[str, Any]) -> LedgerUpdate:
    return LedgerUpdate(
        order_id=update["order_id"],
        client_id=update["client"],
        num_examples=update["num_examples"],
        num_steps=update["num_steps"],
        global_loss=update["global_loss"],
        digest=update["digest"],
        # Entries from before there were encodings don't name it.
        encoding=update.get("encoding", Encoding.STATE_DICT),
        delta_norm=update["delta_norm"],
        verdict=update["verdict"],
        base_digest=update.get("base"),
        staleness=update.get("staleness", 0),
        sections=tuple((name, size_bytes) for name, size_bytes in update.get("sections", ())),
    )


def entry_digest(entry: bytes) -> str:
    """Return the BLAKE3-256 digest that names an entry and that the next entry carries."""
    return blake3(entry).hexdigest()


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

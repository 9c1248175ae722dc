"""One entry a finished round, chained by digest: what went in, what came out.

A round that is rolled back has a second entry, which says so; its repetition has one of its own.

The chain finds accidents (a flipped bit, a changed or missing row). Against somebody who can
rewrite the whole store it proves nothing.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

GENESIS = "0" * 64


def entry_bytes(
    *,
    run_id: str,
    round_number: int,
    attempt: int,
    base_digest: str,
    base_state_digest: str | None,
    model_digest: str,
    state_digest: str | None,
    settings: Mapping[str, Any],
    adjustments: Mapping[str, Any],
    updates: Sequence[Mapping[str, Any]],
    previous: str,
) -> bytes:
    """Return the canonical JSON of a round's entry.

    The states are the server's, beside base and model. `adjustments` are what of the settings was
    changed for the attempt. `updates` are in the order of aggregation, each with order_id, client,
    num_examples, num_steps, global_loss, digest, encoding, delta_norm and verdict, its sections'
    names and sizes if the model isn't all, and where it began with the model of an earlier round
    that one's digest as base, and staleness, the rounds between. `previous` is the digest of the
    entry before,
    GENESIS for the first.
    """
    entry = {
        "run": run_id,
        "round": round_number,
        "attempt": attempt,
        "base": base_digest,
        "base_state": base_state_digest,
        "model": model_digest,
        "state": state_digest,
        "settings": settings,
        "adjustments": adjustments,
        "updates": list(updates),
        "previous": previous,
    }
    return _canonical(entry)


def rollback_bytes(
    *,
    run_id: str,
    round_number: int,
    attempt: int,
    base_digest: str,
    model_digest: str,
    previous: str,
) -> bytes:
    """Return the canonical JSON of the entry that takes a round's model back for its base."""
    entry = {
        "run": run_id,
        "round": round_number,
        "attempt": attempt,
        "rolled_back": model_digest,
        "to": base_digest,
        "previous": previous,
    }
    return _canonical(entry)


def entry_digest(entry: bytes) -> str:
    """Return the BLAKE3-256 digest that names an entry and that the next one carries."""
    return blake3(entry).hexdigest()


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

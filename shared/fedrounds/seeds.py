"""Seeds of random streams: each depends on its purpose, and never on what ran before."""

from blake3 import blake3


def derive_seed(
    seed: int, purpose: str, *, round_number: int = 0, attempt: int = 0, client_id: int = 0
) -> int:
    """Return a seed in [0, 2^63) for one purpose in one piece of work.

    The same arguments give the same seed on every machine; other arguments give an unrelated seed
    (BLAKE3 of the arguments' text).
    """
    text = f"{seed}/{purpose}/{round_number}/{attempt}/{client_id}"
    return int.from_bytes(blake3(text.encode()).digest(length=8), "little") >> 1

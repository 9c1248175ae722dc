"""Where every random stream begins: a function of what it is for, never of what ran before."""

from blake3 import blake3


def derive_seed(
    seed: int, purpose: str, *, round_number: int = 0, attempt: int = 0, client_id: int = 0
) -> int:
    """Return a seed in [0, 2^63) for one purpose in one piece of work.

    The same arguments give the same seed on every machine; any other gives one that is unrelated
    (BLAKE3 of the arguments' text).
    """
    text = f"{seed}/{purpose}/{round_number}/{attempt}/{client_id}"
    return int.from_bytes(blake3(text.encode()).digest(length=8), "little") >> 1

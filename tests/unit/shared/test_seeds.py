"""Seeds: pinned values, and streams that don't meet."""

from fedrounds.seeds import derive_seed


def test_a_seed_stays_what_it_is() -> None:
    """Pinned: another value would make every finished run impossible to repeat.

    The first 8 bytes of BLAKE3("7/train/2/1/5"), little-endian, shifted right once.
    """
    seed = derive_seed(7, "train", round_number=2, attempt=1, client_id=5)
    assert seed == 2_271_495_147_821_223_207
    assert derive_seed(0, "init") == 7_073_195_424_062_614_891


def test_every_argument_makes_another_seed() -> None:
    """No two pieces of work share a stream, and digits don't run into each other."""
    seeds = [
        derive_seed(seed, purpose, round_number=number, attempt=attempt, client_id=client)
        for seed in (0, 1, 11)
        for purpose in ("train", "cohort", "init")
        for number in (0, 1, 11)
        for attempt in (0, 1, 11)
        for client in (0, 1, 11)
    ]
    assert len(set(seeds)) == 3**5
    assert all(0 <= seed < 2**63 for seed in seeds)

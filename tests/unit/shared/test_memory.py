"""What the garbage collector looks at."""

import gc

import pytest

from fedrounds.memory import importing_what_stays


def test_what_is_imported_in_the_block_is_never_looked_at_again() -> None:
    """The collector rests in the block and works after it, also after an error."""
    try:
        frozen_before = gc.get_freeze_count()
        with importing_what_stays():
            assert not gc.isenabled()
            kept = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen_before + len(kept)
        looked_at = {id(thing) for thing in gc.get_objects()}
        assert not looked_at & {id(thing) for thing in kept}
        with pytest.raises(ImportError), importing_what_stays():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()

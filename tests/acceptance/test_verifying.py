"""`verify` of a real run: whole as it was left, and a flipped bit found by name."""

import shutil
from pathlib import Path

from tests.acceptance.conftest import CLIENTS, Undisturbed
from tests.acceptance.federation import TINY
from tests.processes import Scene


def test_verify_re_aggregates_a_whole_run_and_names_a_flipped_bit(
    scene: Scene, undisturbed: Undisturbed
) -> None:
    """Exit code 0 and every round made again; after one bit has flipped 1 and the round's name."""
    state_dir = scene.folder / "copy"
    shutil.copytree(undisturbed(TINY).folder, state_dir)
    whole = scene.command("verify", "--state-dir", state_dir)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout == (
        f"6 rounds: chain whole, rows whole, 7 models whole, {6 * len(CLIENTS)} updates whole, "
        "0 quarantined payloads whole, 6 of 6 re-aggregated\n"
    )
    (update,) = (state_dir / "spool").glob("*-r4-a1-c1-*")
    flip_bit(update)
    damaged = scene.command("verify", "--state-dir", state_dir)
    assert (damaged.returncode, damaged.stderr) == (1, "")
    finding, summary = damaged.stdout.splitlines()
    assert "round 4: the update of client 1 holds other bytes than were written" in finding
    assert summary.endswith("5 of 6 re-aggregated (1 damaged)")


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

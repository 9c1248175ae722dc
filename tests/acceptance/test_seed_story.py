"""The project's own story, in a small form: NaN for all, one round named, one client cured."""

import math
import re
import subprocess
import sys

from tests.processes import GENEROUS_S, ROOT


def _told(*flags: str) -> list[str]:
    """Run the story as its reader does; returns the text of each act."""
    done = subprocess.run(
        [sys.executable, "examples/seed_story.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Three acts, two of them with a server and three clients of their own.
        timeout=3 * GENEROUS_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.split(r"\nAct \d: ", done.stdout)[1:]


def _rounds(act: str) -> list[tuple[float, float]]:
    """Return (loss, accuracy) of each round in the output."""
    rounds = re.findall(r"^round +\d+   loss (\S+)   test acc (\S+)", act, re.MULTILINE)
    return [(float(loss), float(accuracy)) for loss, accuracy in rounds]


def test_one_bad_client_spoils_all_or_one_round_or_nothing() -> None:
    """Averaging alone ends in NaN; checks keep the model finite; the doctor keeps the client, too.

    Two rounds. A model of NaN answers class 0, and 200 of the 2000 held-out digits are zeros.
    """
    plain, checked, cured = _told("--rounds", "2", "--shares", "10")
    assert [math.isnan(loss) for loss, _ in _rounds(plain)] == [True, True]
    assert [accuracy for _, accuracy in _rounds(plain)] == [0.1, 0.1]
    assert "0.1000 are zeros" in plain

    assert len(_rounds(checked)) == 2
    assert all(math.isfinite(loss) and accuracy > 0.8 for loss, accuracy in _rounds(checked))
    assert re.findall(r"(\d) updates counted", checked) == ["2", "2"]
    assert re.findall(r"client (\d): (\S+), step \d+", checked) == [("1", "non-finite-loss")] * 2

    assert re.findall(r"(\d) updates counted", cured) == ["3", "3"]
    # The remedy of the first round is in force in the second: nothing goes wrong there.
    verdicts = re.findall(r"client (\d): (.*)", cured)
    assert [client for client, _ in verdicts] == ["1"]
    assert re.match(
        r"bad-data at step \d+ \(1 sample with NaN in the input\): dropped, training went on",
        verdicts[0][1],
    )
    assert _rounds(cured)[-1][1] > _rounds(cured)[0][1] > 0.8

"""The doctor alone: the examples of docs and examples run, and cure what is planted."""

import re
import runpy
from pathlib import Path

import pytest

from tests.processes import ROOT


def test_a_users_own_loop_is_cured_with_the_proof_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of the three failed readings is named, is proven to be the cause, and all are left out.

    Kinds are well apart: without the failed readings nearly all of the new ones are right.
    """
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(
        r"^bad-data at step \d+ \(1 sample with NaN in the input\): dropped, training went on$",
        shown,
        re.MULTILINE,
    )
    assert shown.count("bad-data at") == 1
    assert re.search(r"samples +number (17|404|777) \(NaN in the input, 1\)", shown)
    assert re.search(r"unchanged +fails at step \d+", shown)
    assert re.search(r"without the suspects +1 +goes well", shown)
    assert float(re.findall(r"Right on (\S+)% of 500", shown)[0]) > 95
    losses = [float(loss) for loss in re.findall(r"loss (\S+) after", shown)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("page", ["docs/doctor.md"])
def test_the_program_in_the_documentation_does_what_it_says(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, it ends with a finite loss and one diagnosis."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    copy = tmp_path / "program.py"
    copy.write_text(program)
    runpy.run_path(str(copy))
    first, *verdicts = capsys.readouterr().out.splitlines()
    assert float(first.split()[1]) < 0.5
    assert [re.sub(r"\d+", "N", verdict) for verdict in verdicts] == [
        "bad-data at step N (N sample with NaN in the input): dropped, training went on"
    ]

"""The papers' way of counting rounds."""

import pytest

from benchmarks.paper_report import crossing


@pytest.mark.parametrize(
    ("accuracies", "rounds"),
    [
        # From the best so far, 0.96 in round 2, to 0.98 in round 4: half of the way from 3 to 4.
        ([0.5, 0.96, 0.95, 0.98, 0.99], 3.5),
        ([0.5, 0.97], 2.0),
        ([0.98], 1.0),
        ([0.5, 0.9699], None),
    ],
)
def test_a_target_is_crossed_between_two_rounds(
    accuracies: list[float], rounds: float | None
) -> None:
    assert crossing(accuracies, 0.97) == (rounds if rounds is None else pytest.approx(rounds))

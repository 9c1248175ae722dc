"""Whole numbers, such as client ids and rounds, as text."""

from collections.abc import Iterable


def numbers_text(numbers: Iterable[int]) -> str:
    """Return whole numbers in order, runs of them by their ends: "1 to 3, 7"; "none" of none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(words) or "none"

"""What a person reads of a run."""

import pytest

from fedserver.report import numbers_text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "none"),
        ([4], "4"),
        ([3, 1, 2], "1 to 3"),
        ([0, 3], "0, 3"),
        (range(1, 11), "1 to 10"),
        ([9, 1, 2, 3, 5, 10], "1 to 3, 5, 9 to 10"),
    ],
)
def test_numbers_are_told_in_words(numbers: list[int], text: str) -> None:
    assert numbers_text(numbers) == text

"""What a person reads of a run."""

import pytest
from rich.console import Console

from fedserver.numbers import numbers_text
from fedserver.records import ModelEvaluation
from fedserver.reporting.tables import class_table, share_text


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
def test_numbers_are_described_in_words(numbers: list[int], text: str) -> None:
    assert numbers_text(numbers) == text


def test_ten_classes_of_a_thousand_examples_each_fit_a_terminal_of_80_columns() -> None:
    """Nothing is cut, neither a heading nor a count."""
    evaluation = ModelEvaluation(
        accuracy=0.1,
        loss=1.0,
        class_accuracy=[0.1] * 10,
        confusion=[[1000] * 10 + [0]] * 10,
    )
    console = Console(width=80)
    with console.capture() as captured:
        console.print(class_table(evaluation, title="round 1"))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["true", "accuracy", *map(str, range(10))] in lines
    assert lines.count(["0", "0.1000", *["1000"] * 10]) == 1


def test_a_share_is_per_cent_and_what_is_none_keeps_its_name() -> None:
    """A client may have reported a number that isn't finite: its name is kept and shown."""
    assert [share_text(share) for share in (0.12345, 1.0, None, "nan")] == [
        "12.3 %",
        "100 %",
        "",
        "nan",
    ]

"""What settings say of the best model, and of a model that is good enough."""

import pytest

from fedrounds.errors import InvalidInput
from fedrounds.goals import Goal, parse_bound, parse_goal


def test_the_best_round_is_the_earliest_of_equals() -> None:
    values = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.1}
    assert Goal("f1", is_highest=True).best_of(values) == 2
    assert Goal("f1", is_highest=False).best_of(values) == 3
    assert Goal("f1", is_highest=True).best_of({}) is None
    assert Goal("f1", is_highest=True).prefers(0.9, to=0.5)
    assert not Goal("f1", is_highest=False).prefers(0.9, to=0.5)
    assert not Goal("f1", is_highest=True).prefers(0.5, to=0.5)


@pytest.mark.parametrize("text", ["f1:max", "loss:min"])
def test_a_goal_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_goal(text)) == text


@pytest.mark.parametrize("text", ["", "f1", "f1:", "f1:best", ":max", "top 5:max", "f1:max:min"])
def test_what_says_no_goal_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="such as f1:max or loss:min"):
        parse_goal(text)


@pytest.mark.parametrize(
    ("text", "passes", "fails"),
    [("f1>0.9", 0.91, 0.9), ("loss < 1e-1", 0.09, 0.1), ("r2>-0.5", 0.0, -0.5)],
)
def test_a_bound_is_passed_beyond_it(text: str, passes: float, fails: float) -> None:
    bound = parse_bound(text)
    assert bound.is_passed_by(passes)
    assert not bound.is_passed_by(fails)
    assert parse_bound(str(bound)) == bound


@pytest.mark.parametrize("text", ["", "f1", "f1>", "f1=0.9", "f1>=0.9", "f1>nan", "f1>inf", "5>1"])
def test_what_says_no_bound_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="doesn't say when a model is good enough"):
        parse_bound(text)

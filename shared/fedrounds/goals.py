"""What makes one model of a run better than another, and when a model is good enough to stop."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedrounds.errors import InvalidInput


@dataclass(frozen=True)
class Goal:
    """The number of an evaluation that tells which model is best, such as "f1:max"."""

    name: str
    is_highest: bool

    def prefers(self, value: float, *, to: float) -> bool:
        """Return whether a model with this value is better than a model with another one."""
        return value > to if self.is_highest else value < to

    def best_of(self, values: Mapping[int, float]) -> int | None:
        """Return the round with the best value, the earliest of equals; None without any."""
        if not values:
            return None
        sign = -1 if self.is_highest else 1
        return min(values, key=lambda number: (sign * values[number], number))

    def __str__(self) -> str:
        return f"{self.name}:{'max' if self.is_highest else 'min'}"


LOWEST_LOSS = Goal("loss", is_highest=False)


@dataclass(frozen=True)
class Bound:
    """A bound that a good enough model passes, such as "f1>0.9"."""

    name: str
    is_above: bool
    value: float

    def is_passed_by(self, value: float) -> bool:
        """Return whether a model with this value is good enough."""
        return value > self.value if self.is_above else value < self.value

    def __str__(self) -> str:
        return f"{self.name}{'>' if self.is_above else '<'}{self.value:g}"


def parse_goal(text: str) -> Goal:
    """Return the goal that a text such as "f1:max" or "loss:min" says.

    Raises:
        InvalidInput: it says none.
    """
    name, colon, direction = text.partition(":")
    if not colon or not name.isidentifier() or direction not in ("max", "min"):
        raise InvalidInput(
            f"{text!r} doesn't say which model is best; write the name of a number and whether "
            "its largest or smallest value is best, such as f1:max or loss:min"
        )
    return Goal(name, direction == "max")


def parse_bound(text: str) -> Bound:
    """Return the bound that a text such as "f1>0.9" or "loss<0.1" says.

    Raises:
        InvalidInput: it says none.
    """
    matched = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([-+.\w]+)\s*", text)
    try:
        value = float(matched[3]) if matched else math.nan
    except ValueError:
        value = math.nan
    if matched is None or not matched[1].isidentifier() or not math.isfinite(value):
        raise InvalidInput(
            f"{text!r} doesn't say when a model is good enough; write the name of a number, > or "
            "<, and a bound, such as accuracy>0.9 or loss<0.1"
        )
    return Bound(matched[1], matched[2] == ">", value)

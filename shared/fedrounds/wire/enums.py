"""Pairs the members of an enum with the numbers that protobuf gives them."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Protocol, TypeVar

E = TypeVar("E", bound=StrEnum)
N = TypeVar("N", bound=int)
N_co = TypeVar("N_co", bound=int, covariant=True)


class _ProtobufEnum(Protocol[N_co]):
    """What protobuf makes of an enum of the protocol."""

    def Value(self, name: str) -> N_co:  # noqa: N802
        """Return the number of a name."""


def numbers_of(
    enum_type: type[E], protobuf_enum: _ProtobufEnum[N], members: Iterable[E] | None = None
) -> dict[E, N]:
    """Return the protocol's number of each member of `enum_type`, or of `members` alone.

    The protocol's enum has the same names with a prefix: RunFailure.TOO_FEW_UPDATES is
    RUN_FAILURE_TOO_FEW_UPDATES.

    Raises:
        ValueError: the protocol has no such name.
    """
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum_type.__name__).upper()
    return {
        member: protobuf_enum.Value(f"{prefix}_{member.name}")
        for member in members or tuple(enum_type)
    }


def members_of(numbers: dict[E, N]) -> dict[int, E]:
    """Return the member of each number: the way back of `numbers_of`."""
    return {int(number): member for member, number in numbers.items()}

"""The values the coordinator works with and the store keeps. Times are seconds since the epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedserver.rounds import OrderState, Phase
from shared.types import ClientUpdate


def json_number(value: float) -> float | str:
    """Return a number as JSON can hold it; JSON has no NaN, so non-finite ones by their names."""
    return value if abs(value) < float("inf") else str(value)


class RunState(StrEnum):
    """Where a run stands."""

    OPEN = "OPEN"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A sequence of rounds under one set of settings."""

    run_id: str
    number: int
    settings: Mapping[str, Any]
    state: RunState


@dataclass(frozen=True, kw_only=True)
class Session:
    """A client process and the ids it serves; `num_examples` is empty until it told."""

    session_id: str
    instance_key: str
    client_ids: tuple[int, ...]
    num_examples: tuple[int, ...]
    software_version: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """One piece of work for one client in one attempt at a round."""

    order_id: str
    client_id: int
    state: OrderState = OrderState.OPEN


@dataclass(frozen=True, kw_only=True)
class OrderRecord:
    """What the store knows of an order; `digest` and `reason` are of the update it ended with."""

    order_id: str
    run_id: str
    round_number: int
    attempt: int
    client_id: int
    state: OrderState
    digest: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Round:
    """An attempt at a round; `max_delta_norm` is the norm cap frozen when it opened."""

    run_id: str
    round_number: int
    attempt: int
    phase: Phase
    base_digest: str
    max_delta_norm: float
    orders: tuple[Order, ...]
    model_digest: str | None = None

    @property
    def cohort(self) -> tuple[int, ...]:
        """The client ids chosen, ascending."""
        return tuple(order.client_id for order in self.orders)


@dataclass(frozen=True, kw_only=True)
class StoredUpdate:
    """An update the round rests on."""

    client_id: int
    update: ClientUpdate


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; an incident is an event of something that went wrong.

    `fields` holds what belongs to the kind, JSON values only.
    """

    kind: str
    at: float
    round_number: int | None = None
    attempt: int | None = None
    client_id: int | None = None
    is_incident: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

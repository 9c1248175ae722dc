"""The history of a run: each attempt at a round, its orders, updates and incidents, as values.

The store reads it (`read_history`, `read_rounds`); fedserver.reporting.as_json makes it JSON. Times
are seconds since the epoch, lengths of time seconds of the run's clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedrounds.goals import Goal
from fedrounds.types import Encoding
from fedserver.phases import OrderState, Phase
from fedserver.records import Adjustments, ClientEvaluation, Event, ModelEvaluation


@dataclass(frozen=True, kw_only=True)
class OrderHistory:
    """One order of an attempt; its times are None until they come."""

    order_id: str
    client_id: int
    state: OrderState
    handed_out_at: float | None
    ended_at: float | None


@dataclass(frozen=True, kw_only=True)
class UpdateHistory:
    """One update that came into an attempt.

    `verdict` is the state of its order, `reason` says why it doesn't count. `metrics` are numbers;
    those that aren't finite are held by their names. `staleness` is the number of rounds since its
    order was given. `received_after_s` counts from the opening of the attempt, `answered_s` from
    the moment at which the order was handed out; None: it isn't known.
    """

    order_id: str
    client_id: int
    staleness: int
    num_examples: int
    digest: str
    encoding: str
    size_bytes: int
    verdict: OrderState
    metrics: Mapping[str, float | str]
    reason: str | None
    received_at: float
    received_after_s: float | None
    answered_s: float | None


@dataclass(frozen=True, kw_only=True)
class CompressionSummary:
    """How well the updates of an attempt are compressed.

    `ratio` is the bytes sent over the bytes of as many whole models. `error` is the mean of the
    losses that clients report (L2 norm of what is lost over that of what was to be sent); None if
    none does.
    """

    ratio: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """What came of an attempt at a round, without its clients.

    `model_digest` is None until it is DONE. `evaluation` is of its model, None until known;
    `client_evaluation` of its base model by its clients, None if they weren't asked.
    """

    round_number: int
    attempt: int
    phase: Phase
    base_digest: str
    model_digest: str | None
    evaluation: ModelEvaluation | None
    client_evaluation: ClientEvaluation | None
    has_confusion: bool

    @property
    def is_done(self) -> bool:
        """Whether its model is the round's."""
        return self.phase is Phase.DONE


@dataclass(frozen=True, kw_only=True)
class AttemptHistory(AttemptResult):
    """An attempt at a round with all its events.

    `adjustments` are what of the settings was changed for it. `num_carried_over` counts the orders
    of earlier rounds that were at work when it opened. `collected_s` is the time from opening to
    close, `took_s` from opening to end; None: it isn't known yet. The first attempt of a run also
    has the incidents from before it opened.
    """

    adjustments: Adjustments
    orders: Sequence[OrderHistory]
    updates: Sequence[UpdateHistory]
    incidents: Sequence[Event]
    num_carried_over: int
    base_bytes: int
    started_at: float
    closed_at: float | None
    finished_at: float | None
    collected_s: float | None
    took_s: float | None

    @property
    def cohort(self) -> list[int]:
        """The clients that were given orders, ascending."""
        return [order.client_id for order in self.orders]

    @property
    def compression(self) -> CompressionSummary | None:
        """How well the updates that count are compressed; None if none of them is."""
        good = [
            update
            for update in self.updates
            if update.verdict in (OrderState.STORED, OrderState.COUNTED)
        ]
        compressed = [update for update in good if update.encoding != Encoding.STATE_DICT]
        if not compressed:
            return None
        errors = [update.metrics.get("compression_error") for update in compressed]
        reported = [error for error in errors if isinstance(error, float)]
        return CompressionSummary(
            ratio=sum(update.size_bytes for update in good) / (len(good) * self.base_bytes),
            error=sum(reported) / len(reported) if reported else None,
        )


A = TypeVar("A", bound=AttemptResult)


def attempts_that_asked(attempts: Sequence[A]) -> dict[int, A]:
    """Return, for each round whose model clients evaluated, the attempt that asked them.

    That attempt is at the next round: clients evaluate a model when they begin to train from it, so
    nobody evaluates the last model of a run. Round 0 stands for the first model.
    """
    models = {attempt.round_number: attempt.model_digest for attempt in attempts if attempt.is_done}
    return {
        attempt.round_number - 1: attempt
        for attempt in attempts
        if attempt.client_evaluation is not None
        and (
            attempt.round_number == 1 or models.get(attempt.round_number - 1) == attempt.base_digest
        )
    }


def models_by_round(attempts: Sequence[AttemptResult]) -> dict[int, str]:
    """Return the digest of the model of each round that is done and not rolled back."""
    return {
        attempt.round_number: attempt.model_digest
        for attempt in attempts
        if attempt.is_done and attempt.model_digest is not None
    }


def best_round(attempts: Sequence[AttemptResult], goal: Goal) -> int | None:
    """Return the number of the round with the best model, the earliest of equals."""
    values = {
        attempt.round_number: attempt.evaluation.numbers.get(goal.name)
        for attempt in attempts
        if attempt.is_done and attempt.evaluation is not None
    }
    return goal.best_of({number: value for number, value in values.items() if value is not None})

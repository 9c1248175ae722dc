"""The way back from a bad model: its round is repeated from the model before it.

A model is bad by its evaluation (fedserver.models.regression), or because the clients that it was
sent to agree on that (fedserver.rounds.deciding).
"""

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.types import IncidentKind
from fedserver.clients.open_orders import OpenOrders
from fedserver.events import event_of
from fedserver.phases import Phase
from fedserver.records import Attempt
from fedserver.rounds.adjustments import adjustment_text, after_bad_model
from fedserver.store import AsyncStore


async def roll_back(
    bad: Attempt,
    current: Attempt,
    *,
    max_adjustments: int,
    store: AsyncStore,
    open_orders: OpenOrders,
) -> None:
    """Take back the model that a round has made.

    The round after it, if `current` is an attempt at it that goes on, is abandoned.
    """
    is_open = current.phase in (Phase.COLLECTING, Phase.AGGREGATING)
    adjustments = after_bad_model(bad.adjustments, max_steps=max_adjustments)
    events = [
        event_of(
            IncidentKind.MODEL_ROLLED_BACK,
            bad,
            is_incident=True,
            model=bad.model_digest,
            to=bad.base_digest,
            change=adjustment_text(adjustments) or None,
        )
    ]
    if is_open:
        reason = f"the model it began with was rolled back, round {bad.round_number} is repeated"
        events.append(
            event_of(IncidentKind.ROUND_ABANDONED, current, is_incident=True, reason=reason)
        )
    await store.rounds.roll_back(
        bad,
        events,
        adjustments_after=adjustments,
        abandoned=current if is_open else None,
    )
    failpoint(FailPoint.ROLLED_BACK)
    # After the transaction: until then the store has the orders open, and updates may come in.
    open_orders.abandon_round(current)

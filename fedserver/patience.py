"""How long the coordinator waits for a client that doesn't get further, or is gone."""

from fedserver.events import event_of
from fedserver.orderbook import OpenOrder
from fedserver.parts import Parts
from fedserver.rounds import OrderState
from shared.failpoints import FailPoint, pass_by
from shared.types import IncidentKind


async def give_up_orders(parts: Parts) -> None:
    """Abandon the orders whose clients don't get further, or are gone."""
    if parts.settings.require_all:
        return
    for order in parts.book.open_orders():
        stalled = order.handed_out_at is not None and (
            parts.book.idle_s(order) > parts.settings.stall_after
        )
        lost = order.handed_out_at is None and not parts.sessions.has_live_holder(
            order.order.client_id
        )
        if stalled or lost:
            kind = IncidentKind.CLIENT_STALLED if stalled else IncidentKind.CLIENT_LOST
            await _abandon(parts, order, kind)


async def _abandon(parts: Parts, order: OpenOrder, kind: IncidentKind) -> None:
    """End an order without an update, and say why."""
    current = parts.book.current
    assert current is not None
    happened = event_of(
        kind,
        current.record,
        client_id=order.order.client_id,
        is_incident=True,
        idle_s=parts.book.idle_s(order),
    )
    order_id = order.order.order_id
    recorded = await parts.workers.in_store(
        parts.store.abandon_order,
        parts.run.run_id,
        order_id,
        happened,
        strikes=True,
    )
    pass_by(FailPoint.ORDER_ABANDONED)
    if recorded is not None:
        parts.book.settle(order_id, OrderState.ABANDONED)
        parts.bus.publish(recorded)

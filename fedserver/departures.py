"""Clients that leave a run before its end: what becomes of them and of their open orders.

A client that leaves is neither chosen nor waited for until it registers again, and isn't suspended:
it did what a client should do. See Leave in federation.proto.
"""

from collections.abc import Collection

from fedserver.events import event_of
from fedserver.orderbook import OpenOrder
from fedserver.parts import Parts
from fedserver.records import Session
from shared.failpoints import FailPoint, pass_by
from shared.types import IncidentKind, Leave, LeaveReason


async def leave(parts: Parts, session: Session, said: Leave) -> None:
    """Let clients of a session go: end their open orders, but for those that are still awaited.

    An order is awaited whose client is coming back, or has its update durably; under --require-all
    also that of a client that was stopped, since such a run waits however long it takes.
    """
    leaving = set(session.client_ids)
    if said.client_ids:
        leaving &= set(said.client_ids)
    waits_for_ever = parts.settings.require_all and (
        said.coming_back or said.reason is LeaveReason.STOPPED
    )
    orders = [one for one in parts.book.open_orders() if one.order.client_id in leaving]
    awaited = [
        one
        for one in orders
        if waits_for_ever or said.coming_back or one.order.order_id in said.kept_order_ids
    ]
    expected = leaving if waits_for_ever else {one.order.client_id for one in awaited}
    # From here on they count as gone, and this call alone ends their orders.
    parts.sessions.leave(leaving, expected=leaving)
    ended = [one for one in orders if one not in awaited]
    fields = {"reason": said.reason, **({"coming_back": True} if said.coming_back else {})}
    for one in ended:
        await end_order(parts, one, **fields)
    others = sorted(leaving - {one.order.client_id for one in ended})
    if others:
        happened = event_of(
            IncidentKind.CLIENT_LEFT,
            parts.book.latest,
            client_id=others[0] if len(others) == 1 else None,
            is_incident=True,
            **({"clients": others} if len(others) > 1 else {}),
            **fields,
        )
        await parts.store.add_events(parts.run.run_id, [happened])
    # Whoever has registered meanwhile is back.
    await _take_out(
        parts, {one for one in leaving - expected if parts.sessions.away_s(one) is not None}
    )


async def end_order(parts: Parts, order: OpenOrder, **fields: object) -> None:
    """End an open order whose client has left; `fields` belong to the event."""
    happened = event_of(
        IncidentKind.CLIENT_LEFT,
        parts.book.latest,
        client_id=order.order.client_id,
        is_incident=True,
        **fields,
    )
    order_id = order.order.order_id
    was_open = await parts.store.abandon_order(parts.run.run_id, order_id, happened)
    pass_by(FailPoint.ORDER_ABANDONED)
    if was_open:
        parts.book.forget(order_id)


async def stop_expecting(parts: Parts, order: OpenOrder, away_s: float) -> None:
    """End an order whose client said that it would be back, and isn't."""
    await _take_out(parts, {order.order.client_id})
    await end_order(parts, order, reason="did not come back", away_s=away_s)


async def _take_out(parts: Parts, client_ids: Collection[int]) -> None:
    changed, ended = parts.sessions.leave(client_ids)
    for session in changed:
        await parts.store.save_session(parts.run.run_id, session)
    for session_id in ended:
        await parts.store.remove_session(session_id)

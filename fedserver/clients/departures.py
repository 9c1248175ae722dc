"""Clients that leave a run before its end, and their open orders.

A client that leaves is neither chosen nor waited for until it registers again. It isn't suspended:
it did what a client should do. See Leave in federation.proto.
"""

from collections.abc import Collection, Mapping

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.types import IncidentKind, Leave, LeaveReason
from fedserver.clients.open_orders import OpenOrder, OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.records import Session
from fedserver.store import AsyncStore


async def leave(
    session: Session,
    request: Leave,
    *,
    run_id: str,
    require_all: bool,
    sessions: Sessions,
    open_orders: OpenOrders,
    store: AsyncStore,
) -> None:
    """Let clients of a session go: end their open orders, but for those that are still awaited.

    An order is awaited whose client is coming back, or has its update durably; under --require-all
    also that of a client that was stopped, since such a run waits however long it takes.
    """
    leaving = set(session.client_ids)
    if request.client_ids:
        leaving &= set(request.client_ids)
    waits_for_ever = require_all and (request.coming_back or request.reason is LeaveReason.STOPPED)
    orders = [order for order in open_orders.list_open() if order.order.client_id in leaving]
    awaited = [
        order
        for order in orders
        if waits_for_ever or request.coming_back or order.order.order_id in request.kept_order_ids
    ]
    expected = leaving if waits_for_ever else {order.order.client_id for order in awaited}
    # From here on they count as gone, and this call alone ends their orders.
    sessions.leave(leaving, expected=leaving)
    ended = [order for order in orders if order not in awaited]
    fields = {"reason": request.reason, **({"coming_back": True} if request.coming_back else {})}
    for order in ended:
        await abandon_for_departure(
            order, fields, run_id=run_id, open_orders=open_orders, store=store
        )
    others = sorted(leaving - {order.order.client_id for order in ended})
    if others:
        left = event_of(
            IncidentKind.CLIENT_LEFT,
            open_orders.latest,
            client_id=others[0] if len(others) == 1 else None,
            is_incident=True,
            **({"clients": others} if len(others) > 1 else {}),
            **fields,
        )
        await store.events.add_events(run_id, [left])
    # Whoever has registered meanwhile is back.
    gone = {client for client in leaving - expected if sessions.away_s(client) is not None}
    await _take_out(gone, run_id=run_id, sessions=sessions, store=store)


async def abandon_for_departure(
    order: OpenOrder,
    fields: Mapping[str, object],
    *,
    run_id: str,
    open_orders: OpenOrders,
    store: AsyncStore,
) -> None:
    """End an open order whose client has left; `fields` belong to the event."""
    left = event_of(
        IncidentKind.CLIENT_LEFT,
        open_orders.latest,
        client_id=order.order.client_id,
        is_incident=True,
        **fields,
    )
    order_id = order.order.order_id
    was_open = await store.orders.abandon_order(run_id, order_id, left)
    failpoint(FailPoint.ORDER_ABANDONED)
    if was_open:
        open_orders.forget(order_id)


async def stop_expecting(
    order: OpenOrder,
    away_s: float,
    *,
    run_id: str,
    sessions: Sessions,
    open_orders: OpenOrders,
    store: AsyncStore,
) -> None:
    """End an order whose client is expected back, and isn't back after `away_s` seconds."""
    await _take_out({order.order.client_id}, run_id=run_id, sessions=sessions, store=store)
    fields = {"reason": "did not come back", "away_s": away_s}
    await abandon_for_departure(order, fields, run_id=run_id, open_orders=open_orders, store=store)


async def _take_out(
    client_ids: Collection[int], *, run_id: str, sessions: Sessions, store: AsyncStore
) -> None:
    changed, ended = sessions.leave(client_ids)
    for session in changed:
        await store.runs.save_session(run_id, session)
    for session_id in ended:
        await store.runs.remove_session(session_id)

"""What finished rounds leave behind, and for how long it is kept."""

from fedserver.api.downloads import Downloads
from fedserver.events import event_of
from fedserver.models.checkpoints import Checkpoints
from fedserver.records import HeldState
from fedserver.rounds.open_orders import OpenOrders
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool


async def drop_updates(
    context: RunContext,
    *,
    done_round: int,
    open_orders: OpenOrders,
    store: AsyncStore,
    spool: Spool,
    quarantine: QuarantineFolder,
    threads: Threads,
) -> None:
    """Delete the updates that `--keep-updates` lets go now that `done_round` rounds are done.

    What the open round needs stays, and what is arriving right now; what is held in quarantine and
    hasn't got there yet moves there first. What was never finished goes with its order. The
    database's log is shortened too.
    """
    await store.shorten_log()
    if held := await store.held_updates():
        await threads.on_disk(quarantine.fill, held, spool)
        await evict_updates(store=store, quarantine=quarantine, threads=threads)
    at_work = {order.order.order_id for order in open_orders.list_all()}
    await threads.on_disk(spool.drop_unfinished, but=at_work)
    keep_updates = context.settings.keep_updates
    if keep_updates == "all":
        return
    kept = await store.updates_to_keep(context.run_id, since_round=done_round - keep_updates + 1)
    await threads.on_disk(spool.drop_all_but, kept)


async def evict_updates(
    *, store: AsyncStore, quarantine: QuarantineFolder, threads: Threads
) -> None:
    """Give up the oldest payloads in quarantine until the others fit into `--quarantine-bytes`."""
    for held in quarantine.excess(await store.held_updates()):
        event = event_of("quarantine-evicted", client_id=held.client_id, order_id=held.order_id)
        # Recorded first: bytes without a record are tidied away, a record without bytes misleads.
        if await store.free_held(held, HeldState.EVICTED, event):
            await threads.on_disk(quarantine.drop, held)


async def drop_models(
    context: RunContext,
    *,
    done_round: int,
    store: AsyncStore,
    checkpoints: Checkpoints,
    downloads: Downloads,
    threads: Threads,
) -> None:
    """Delete the models that `--keep-rounds` lets go now that `done_round` rounds are done.

    The run's best model stays, models of earlier runs, and what somebody is downloading right now
    (until a later call).
    """
    keep_rounds = context.settings.keep_rounds
    if keep_rounds == "all":
        return
    let_go = await store.models_let_go(
        context.run_id,
        await threads.on_disk(checkpoints.digests),
        since_round=done_round - keep_rounds + 1,
    )
    for digest in let_go - downloads.under_way():
        await threads.on_disk(checkpoints.drop, digest)

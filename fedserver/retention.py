"""What finished rounds leave behind, and for how long it is kept."""

from fedserver.events import event_of
from fedserver.parts import Parts
from fedserver.records import HeldState


async def drop_updates(parts: Parts, *, done_round: int) -> None:
    """Delete the updates that `--keep-updates` lets go now that `done_round` rounds are done.

    What the open round needs stays, and what is arriving right now; what is held in quarantine and
    hasn't got there yet moves there first. What was never finished goes with its order. The
    database's log is shortened too.
    """
    await parts.store.shorten_log()
    await _fill_quarantine(parts)
    at_work = {one.order.order_id for one in parts.book.orders()}
    await parts.workers.on_disk(parts.spool.drop_unfinished, but=at_work)
    if parts.settings.keep_updates == "all":
        return
    kept = await parts.store.updates_to_keep(
        parts.run.run_id,
        since_round=done_round - parts.settings.keep_updates + 1,
    )
    await parts.workers.on_disk(parts.spool.drop_all_but, kept)


async def _fill_quarantine(parts: Parts) -> None:
    held = await parts.store.held_updates()
    if not held:
        return
    await parts.workers.on_disk(parts.quarantine.fill, held, parts.spool)
    await evict_updates(parts)


async def evict_updates(parts: Parts) -> None:
    """Give up the oldest payloads in quarantine until the others fit into `--quarantine-bytes`."""
    for held in parts.quarantine.excess(await parts.store.held_updates()):
        event = event_of("quarantine-evicted", client_id=held.client_id, order_id=held.order_id)
        if await parts.store.free_held(held, HeldState.EVICTED, event):
            await parts.workers.on_disk(parts.quarantine.drop, held)


async def drop_models(parts: Parts, *, done_round: int) -> None:
    """Delete the models that `--keep-rounds` lets go now that `done_round` rounds are done.

    The run's best model stays, models of earlier runs, and what somebody is downloading right now
    (until a later call).
    """
    if parts.settings.keep_rounds == "all":
        return
    let_go = await parts.store.models_let_go(
        parts.run.run_id,
        await parts.workers.on_disk(parts.checkpoints.digests),
        since_round=done_round - parts.settings.keep_rounds + 1,
    )
    for digest in let_go - parts.downloads.under_way():
        await parts.workers.on_disk(parts.checkpoints.drop, digest)

"""What finished rounds leave behind, and for how long it is kept."""

from fedserver.clients.open_orders import OpenOrders
from fedserver.events import event_of
from fedserver.models.checkpoints import Checkpoints
from fedserver.models.downloads import Downloads
from fedserver.records import HeldState
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool


class Retention:
    """Deletes updates and models that the settings let go; each call may be repeated."""

    def __init__(
        self,
        context: RunContext,
        *,
        open_orders: OpenOrders,
        store: AsyncStore,
        spool: Spool,
        quarantine: QuarantineFolder,
        checkpoints: Checkpoints,
        downloads: Downloads,
        threads: Threads,
    ) -> None:
        self._context = context
        self._open_orders = open_orders
        self._store = store
        self._spool = spool
        self._quarantine = quarantine
        self._checkpoints = checkpoints
        self._downloads = downloads
        self._threads = threads

    async def drop_updates(self, *, done_round: int) -> None:
        """Delete the updates that `--keep-updates` lets go now that `done_round` rounds are done.

        What the open round needs stays, and what is arriving right now. What is held in quarantine
        but still lies in the spool moves there first. What was never finished goes with its order.
        The database's log is shortened too.
        """
        await self._store.database.shorten_log()
        if held := await self._store.quarantine.held_updates():
            await self._threads.on_disk(self._quarantine.fill, held, self._spool)
            await evict_updates(
                store=self._store, quarantine=self._quarantine, threads=self._threads
            )
        at_work = {order.order.order_id for order in self._open_orders.list_all()}
        await self._threads.on_disk(self._spool.drop_unfinished, but=at_work)
        keep_updates = self._context.settings.keep_updates
        if keep_updates == "all":
            return
        # Only the round loop gives orders, and it waits here: no order that may get an update
        # meanwhile is missing from what is kept.
        kept = await self._store.orders.updates_to_keep(
            self._context.run_id, since_round=done_round - keep_updates + 1
        )
        await self._threads.on_disk(self._spool.drop_all_but, kept)

    async def drop_models(self, *, done_round: int) -> None:
        """Delete the models that `--keep-rounds` lets go now that `done_round` rounds are done.

        The run's best model stays, models of earlier runs, and what somebody is downloading right
        now (until a later call).
        """
        keep_rounds = self._context.settings.keep_rounds
        if keep_rounds == "all":
            return
        let_go = await self._store.rounds.models_let_go(
            self._context.run_id,
            await self._threads.on_disk(self._checkpoints.digests),
            since_round=done_round - keep_rounds + 1,
            goal=self._context.settings.goal,
        )
        # Looked at after the store was awaited: a download may have begun meanwhile.
        for digest in let_go - self._downloads.under_way():
            await self._threads.on_disk(self._checkpoints.drop, digest)


async def evict_updates(
    *, store: AsyncStore, quarantine: QuarantineFolder, threads: Threads
) -> None:
    """Give up the oldest payloads in quarantine until the others fit into `--quarantine-bytes`."""
    for held in quarantine.excess(await store.quarantine.held_updates()):
        event = event_of("quarantine-evicted", client_id=held.client_id, order_id=held.order_id)
        # Recorded first: bytes without a record are tidied away, a record without bytes misleads.
        if await store.quarantine.free_held(held, HeldState.EVICTED, event):
            await threads.on_disk(quarantine.drop, held)

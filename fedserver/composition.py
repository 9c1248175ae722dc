"""The composition root: builds the parts of a server for one run, and connects them.

Every part receives what it needs as arguments. Nothing else builds a part, and only this module,
fedserver.server and the tests see all of them.
"""

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fedrounds.types import EntryKind
from fedserver.api.client_api import ClientApi
from fedserver.api.uploads import Uploads
from fedserver.clients.open_orders import OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import EventBus
from fedserver.housekeeping.disk import DiskWatch
from fedserver.housekeeping.retention import Retention
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.models.downloads import Downloads
from fedserver.models.evaluation import Evaluations
from fedserver.prepared import Prepared
from fedserver.records import Attempt, Run
from fedserver.rounds.asynchronous import AsynchronousCollecting
from fedserver.rounds.closing import Closer
from fedserver.rounds.collecting import Collecting, SynchronousCollecting
from fedserver.rounds.coordinator import Coordinator
from fedserver.rounds.last_counted import LastCounted
from fedserver.rounds.opening import Opener
from fedserver.rounds.resuming import resume
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore, Store
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool

_MAX_TICK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The parts of a server for one run."""

    context: RunContext
    bus: EventBus
    store: AsyncStore
    spool: Spool
    quarantine: QuarantineFolder
    checkpoints: Checkpoints
    sessions: Sessions
    open_orders: OpenOrders
    downloads: Downloads
    disk: DiskWatch
    uploads: Uploads
    client_api: ClientApi
    evaluations: Evaluations
    retention: Retention
    last_counted: LastCounted
    collecting: Collecting
    opener: Opener
    closer: Closer
    resume: Callable[[], Awaitable[tuple[Attempt, GlobalModel]]]
    coordinator: Coordinator


def compose(
    settings: ServerSettings,
    prepared: Prepared,
    *,
    run: Run,
    store: Store,
    threads: Threads,
    clock: Callable[[], float],
) -> Composition:
    """Return the parts of a server for a run; all files are in the settings' state-dir.

    `clock` is that of leases and stall rules (see `fedserver.runtime.ServingClock`).
    """
    state_dir = settings.state_dir
    context = RunContext(
        settings=settings,
        run=run,
        strategy=prepared.strategy,
        kinds=prepared.kinds,
        ties=prepared.ties,
        variances=prepared.variances,
        modules=prepared.modules,
        metrics=prepared.task.metrics,
        measurement_sizes=prepared.measurement_sizes,
    )
    bus = EventBus()
    recording = AsyncStore(store, threads=threads, publish=bus.publish)
    spool = Spool(state_dir / "spool")
    quarantine = QuarantineFolder(state_dir / "quarantine", max_bytes=settings.quarantine_bytes)
    checkpoints = Checkpoints(state_dir / "models", prepared.kinds)
    sessions = Sessions(
        store.runs.load_sessions(run.run_id),
        lease_s=settings.lease,
        max_num_examples=settings.max_num_examples,
        clock=clock,
    )
    open_orders = OpenOrders(clock)
    downloads = Downloads(checkpoints, threads, idle_s=settings.stall_after)
    disk = DiskWatch(
        state_dir,
        min_free_bytes=settings.min_free_bytes,
        run_id=run.run_id,
        store=recording,
        bus=bus,
        open_orders=open_orders,
    )
    uploads = Uploads(
        context,
        open_orders=open_orders,
        store=recording,
        spool=spool,
        quarantine=quarantine,
        threads=threads,
    )
    client_api = ClientApi(
        context,
        sessions=sessions,
        open_orders=open_orders,
        store=recording,
        uploads=uploads,
        downloads=downloads,
        disk=disk,
    )
    # With entries of the clients' own nobody uses the global model as it is.
    is_used = not (
        context.strategy.keeps_entries_local or EntryKind.LOCAL in context.kinds.values()
    )
    evaluations = Evaluations(
        prepared.evaluator,
        settings,
        detects_regressions=is_used,
        store=recording,
        checkpoints=checkpoints,
        on_news=open_orders.round_changed.notify,
        threads=threads,
    )
    retention = Retention(
        context,
        open_orders=open_orders,
        store=recording,
        spool=spool,
        quarantine=quarantine,
        checkpoints=checkpoints,
        downloads=downloads,
        threads=threads,
    )
    is_asynchronous = context.strategy.buffer_size > 0
    last_counted = LastCounted(recording, run.run_id, counts_stored=is_asynchronous)
    collecting: Collecting
    if is_asynchronous:
        collecting = AsynchronousCollecting(
            context,
            last_counted=last_counted,
            sessions=sessions,
            open_orders=open_orders,
            store=recording,
            checkpoints=checkpoints,
            disk=disk,
            threads=threads,
        )
    else:
        collecting = SynchronousCollecting(
            context, last_counted=last_counted, open_orders=open_orders, store=recording
        )
    tick_s = _tick_s(settings)
    opener = Opener(
        context,
        prepared.task,
        collecting=collecting,
        last_counted=last_counted,
        tick_s=tick_s,
        sessions=sessions,
        open_orders=open_orders,
        store=recording,
        checkpoints=checkpoints,
        downloads=downloads,
        disk=disk,
        threads=threads,
    )
    closer = Closer(
        context,
        collecting=collecting,
        opener=opener,
        evaluations=evaluations,
        retention=retention,
        open_orders=open_orders,
        store=recording,
        spool=spool,
        checkpoints=checkpoints,
        threads=threads,
    )
    go_on = functools.partial(
        resume,
        context,
        prepared.task,
        opener=opener,
        closer=closer,
        evaluations=evaluations,
        retention=retention,
        last_counted=last_counted,
        store=recording,
        spool=spool,
        quarantine=quarantine,
        checkpoints=checkpoints,
        threads=threads,
    )
    coordinator = Coordinator(
        context,
        resume=go_on,
        tick_s=tick_s,
        collecting=collecting,
        opener=opener,
        closer=closer,
        evaluations=evaluations,
        retention=retention,
        last_counted=last_counted,
        sessions=sessions,
        open_orders=open_orders,
        store=recording,
        checkpoints=checkpoints,
        disk=disk,
        threads=threads,
    )
    return Composition(
        context=context,
        bus=bus,
        store=recording,
        spool=spool,
        quarantine=quarantine,
        checkpoints=checkpoints,
        sessions=sessions,
        open_orders=open_orders,
        downloads=downloads,
        disk=disk,
        uploads=uploads,
        client_api=client_api,
        evaluations=evaluations,
        retention=retention,
        last_counted=last_counted,
        collecting=collecting,
        opener=opener,
        closer=closer,
        resume=go_on,
        coordinator=coordinator,
    )


def _tick_s(settings: ServerSettings) -> float:
    """Return the seconds between two looks at all open orders: a quarter of the shortest bound."""
    shortest_s = min(settings.stall_after, settings.first_step, settings.lease)
    return min(_MAX_TICK_S, shortest_s / 4)

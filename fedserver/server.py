"""Wires the coordinator together and serves it until the run is done or somebody stops it."""

import asyncio
import contextlib
import functools
import importlib.util
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from fedserver.api.client_api import ClientApi
from fedserver.api.downloads import Downloads
from fedserver.api.service import start_server
from fedserver.api.uploads import Uploads
from fedserver.clients.sessions import Sessions
from fedserver.events import EventBus, event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.housekeeping.recovery import note_absence, salvageable
from fedserver.models.aggregation import run_compression
from fedserver.models.checkpoints import Checkpoints
from fedserver.models.evaluation import Evaluator
from fedserver.monitoring.terminal import showing_progress
from fedserver.records import Run, RunState
from fedserver.rounds.coordinator import Coordinator
from fedserver.rounds.open_orders import OpenOrders
from fedserver.run_context import RunContext
from fedserver.run_settings import RUN_SETTINGS
from fedserver.runtime import ServingClock, Threads
from fedserver.settings import ServerSettings, settings_begun_with
from fedserver.store import AsyncStore, Store
from fedserver.strategies import find_strategy
from fedserver.strategies.local_rules import examine_model
from fedserver.strategies.rows import Strategy
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool
from shared.cli import stderr_console
from shared.compression import Shape, packed_shapes
from shared.data import examine_scheme
from shared.errors import InvalidInput, RunFailed, StorageDamaged, WrongSettings
from shared.failpoints import FailPoint, failpoint
from shared.files import locked_folder, raise_file_limit
from shared.memory import keep_one_heap
from shared.stop_signals import StopSignals, interrupting
from shared.tasks import Task, build_model, find_task, kinds_of
from shared.types import Encoding, EntryKind, RunEnd
from shared.weights import examine_first_values, tied_entries

logger = logging.getLogger(__name__)

_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What the settings name, examined before a run begins or goes on with it."""

    task: Task
    strategy: Strategy
    kinds: Mapping[str, EntryKind]
    ties: Mapping[str, str]
    modules: Set[str]
    evaluator: Evaluator


def run_server(settings: ServerSettings) -> None:
    """Serve one run to its end, or until SIGINT or SIGTERM; started again it goes on.

    Raises:
        FederationError: a person's mistake or a failed run, with a sentence that says which.
    """
    with StopSignals(exit_code=0) as signals:
        try:
            _run(settings, signals)
        except KeyboardInterrupt:
            logger.info("stopped before anybody was served; the same command starts again")


def _run(settings: ServerSettings, signals: StopSignals) -> None:
    keep_one_heap()
    raise_file_limit()
    torch.set_num_threads(settings.threads)
    if settings.export is not None:
        _examine_export(settings.export)
    # All that a wrong setting can break comes before a run is begun with it.
    with interrupting():
        prepared = _prepare(settings)
    with locked_folder(settings.state_dir) as state_dir:
        try:
            _expect_database(state_dir)
            store = Store(state_dir / "federation.sqlite", upgrades=True)
            store.examine()
        except StorageDamaged as error:
            raise StorageDamaged(f"{error}; {salvageable(state_dir / 'models')}") from error
        threads = Threads()
        try:
            run = _open_run(store, settings)
            as_begun = settings.going_on_with(run.settings)
            if as_begun != settings:
                with interrupting():
                    prepared = _prepare(as_begun)
            serving = _serve(
                *(as_begun, prepared), run=run, store=store, threads=threads, stop_signals=signals
            )
            asyncio.run(serving)
        finally:
            threads.close()
            store.close()


def _prepare(settings: ServerSettings) -> _Prepared:
    """Return what the settings name.

    Raises:
        InvalidInput: a setting can't be what it is.
        OwnCodeFailed: the task's own code raised an error.
    """
    task = find_task(settings.task)
    strategy = _examine_strategy(settings)
    examine_scheme(settings.partition, settings.partitioning.parameters)
    model = build_model(task)
    kinds = kinds_of(task, model)
    examine_first_values(model, kinds, task=task.name)
    examine_model(strategy.local, model, kinds)
    _examine_compression(settings, model, kinds)
    evaluator = Evaluator(task, model, data_root=settings.data_root)
    evaluator.try_batch()
    return _Prepared(
        task=task,
        strategy=strategy,
        kinds=kinds,
        ties=tied_entries(model),
        modules={name for name, _ in model.named_modules()},
        evaluator=evaluator,
    )


def _examine_export(path: Path) -> None:
    """Refuse a place for the final model that can't be written to, before days of training."""
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--export {path}: there is no such folder; make it first")
    for one in (path, _beside(path)):
        if one.is_dir():
            raise InvalidInput(
                f"--export {path}: {one} is a folder; name a file, such as "
                f"{path / 'model.safetensors'}"
            )
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InvalidInput(
            f"--export {path}: nothing can be written in its folder ({error.strerror}); "
            "choose another one"
        ) from error


def _beside(last: Path) -> Path:
    """Return where the best model goes if it isn't the last."""
    return last.with_stem(f"{last.stem}-best")


def _examine_strategy(settings: ServerSettings) -> Strategy:
    strategy = find_strategy(settings.run_settings())
    if strategy.buffer_size:
        _examine_asynchrony(settings, strategy)
        return strategy
    if settings.concurrency or settings.max_staleness is not None:
        raise InvalidInput(
            "--concurrency and --max-staleness are of asynchronous strategies alone; add "
            "--strategy fedbuff, or leave them out"
        )
    if settings.updates_needed < strategy.min_updates:
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            f"but {settings.updates_needed} are enough to close one; raise --min-updates (or "
            "--min-clients)"
        )
    if strategy.min_updates > 1 and settings.straggler_work == "none":
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            "and --straggler-work none leaves clients out after a round's have been chosen; leave "
            "it away, or take another strategy"
        )
    return strategy


def _examine_asynchrony(settings: ServerSettings, strategy: Strategy) -> None:
    for flag, is_given, instead in (
        ("--clients-per-round", settings.clients_per_round, "say how many work with --concurrency"),
        ("--min-updates", settings.min_updates, "say how many it is with buffer_size"),
        ("--require-all", settings.require_all, "every order's update is waited for anyway"),
        ("--stragglers", settings.stragglers, "its slow clients are slow by themselves"),
        ("--round-deadline", settings.round_deadline is not None, "nobody waits for a slow client"),
    ):
        if is_given:
            raise InvalidInput(
                f"strategy {strategy.name} is asynchronous, a round is {strategy.buffer_size} "
                f"updates whoever they come from: leave out {flag}, {instead}"
            )


def _examine_compression(
    settings: ServerSettings, model: torch.nn.Module, kinds: Mapping[str, EntryKind]
) -> None:
    """Refuse what would make updates larger: more than the model is never admitted."""
    compression = run_compression(settings.run_settings())
    if compression.encoding is Encoding.STATE_DICT:
        return
    shapes: dict[str, Shape] = {
        name: (one.dtype, tuple(one.shape))
        for name, one in model.state_dict().items()
        if kinds[name] is EntryKind.PARAMETER
    }
    packed, whole = (
        sum(math.prod(shape) * dtype.itemsize for dtype, shape in one.values())
        for one in (packed_shapes(shapes, compression), shapes)
    )
    if packed >= whole:
        raise InvalidInput(
            f"--compression {settings.compression} makes {packed} bytes of the {whole} of this "
            "model's parameters; choose another one, or none"
        )


def _expect_database(state_dir: Path) -> None:
    """Refuse a folder with models or updates of a run whose database is gone.

    Raises:
        StorageDamaged: it is.
    """
    database = state_dir / "federation.sqlite"
    folders = [state_dir / name for name in ("models", "spool")]
    if not database.exists() and any(
        folder.is_dir() and any(folder.iterdir()) for folder in folders
    ):
        raise StorageDamaged(
            f"{database} is gone, but what a run has left is there: put the database back, or "
            "start with another --state-dir"
        )


def _open_run(store: Store, settings: ServerSettings) -> Run:
    """Return the unfinished run, or begin the next one."""
    latest = store.latest_run()
    if latest is None or latest.state is not RunState.OPEN:
        return store.begin_run(settings.run_settings())
    wanted = settings.going_on_with(latest.settings).run_settings()
    begun_with = settings_begun_with(latest.settings)
    differing = [name for name in RUN_SETTINGS if begun_with[name] != wanted[name]]
    if not differing:
        logger.info("going on with %s", latest.run_id)
        return latest
    if store.latest_round(latest.run_id) is None:
        reason = "no round had begun when the server was started again with other settings"
        store.end_run(latest.run_id, RunState.FAILED, event_of("run-failed", reason=reason))
        return store.begin_run(settings.run_settings())
    listed = "; ".join(
        f"{name} was {begun_with[name]!r}, is now {wanted[name]!r}" for name in differing
    )
    raise WrongSettings(
        f"{settings.state_dir} holds an unfinished run with other settings ({listed}); "
        "start with the old ones to go on, or with another --state-dir for a new run"
    )


async def _serve(
    settings: ServerSettings,
    prepared: _Prepared,
    *,
    run: Run,
    store: Store,
    threads: Threads,
    stop_signals: StopSignals,
) -> None:
    state_dir = settings.state_dir
    checkpoints = Checkpoints(state_dir / "models", prepared.kinds)
    clock = ServingClock()
    bus, open_orders = EventBus(), OpenOrders(clock)
    recording = AsyncStore(store, threads=threads, publish=bus.publish)
    context = RunContext(
        settings=settings,
        run=run,
        strategy=prepared.strategy,
        kinds=prepared.kinds,
        ties=prepared.ties,
        modules=prepared.modules,
    )
    sessions = Sessions(
        store.load_sessions(run.run_id),
        lease_s=settings.lease,
        max_num_examples=settings.max_num_examples,
        clock=clock,
    )
    spool = Spool(state_dir / "spool")
    quarantine = QuarantineFolder(state_dir / "quarantine", max_bytes=settings.quarantine_bytes)
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
    coordinator = Coordinator(
        context,
        task=prepared.task,
        evaluator=prepared.evaluator,
        sessions=sessions,
        open_orders=open_orders,
        store=recording,
        spool=spool,
        quarantine=quarantine,
        checkpoints=checkpoints,
        downloads=downloads,
        disk=disk,
        threads=threads,
    )

    stop = _stop_event(stop_signals)
    last_done = store.last_done_round(run.run_id)
    evaluated = store.good_evaluations(run.run_id)
    spent_s = store.time_spent_s(run.run_id)
    server, address = await start_server(client_api, host=settings.host, port=settings.port)
    print(f"fedserver listening on {address}", flush=True)
    completing = asyncio.create_task(
        _complete(
            context,
            coordinator,
            client_api,
            store=recording,
            checkpoints=checkpoints,
            threads=threads,
        )
    )
    stopping = asyncio.create_task(stop.wait())
    keeping_time = asyncio.create_task(
        clock.keep(functools.partial(note_absence, open_orders=open_orders, disk=disk))
    )
    try:
        with showing_progress(
            bus,
            open_orders,
            total_rounds=settings.rounds,
            num_done=0 if last_done is None else last_done.round_number,
            evaluated=evaluated,
            spent_s=spent_s,
        ):
            await asyncio.wait({completing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if is_complete := completing.done():
            await completing
        else:
            logger.info("stopping; the same command goes on with %s", run.run_id)
    finally:
        client_api.stop()
        prepared.evaluator.stop()
        await server.stop(_GRACE_S)
        tasks = {completing, stopping, keeping_time}
        for task_left in tasks:
            task_left.cancel()
        await asyncio.wait(tasks)
    if is_complete:
        # Only now: while this takes its time nobody is served, and no clock may notice that.
        _show_end(settings)


def _stop_event(signals: StopSignals) -> asyncio.Event:
    """Return an event of this loop that is set when the process is asked to stop."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(stop.set)

    signals.when_asked(tell)
    return stop


async def _complete(
    context: RunContext,
    coordinator: Coordinator,
    client_api: ClientApi,
    *,
    store: AsyncStore,
    checkpoints: Checkpoints,
    threads: Threads,
) -> None:
    try:
        digest = await coordinator.complete()
    except RunFailed:
        _, failure = await store.last_failure(context.run_id)
        await client_api.finish(RunEnd(has_failed=True, failure=failure))
        raise
    # Killed here, the run is still open: started again it exports and ends it.
    await coordinator.with_room(
        functools.partial(
            _export, context, digest, store=store, checkpoints=checkpoints, threads=threads
        )
    )
    failpoint(FailPoint.RUN_EXPORTED)
    await coordinator.with_room(coordinator.end)
    await client_api.finish(RunEnd(has_failed=False))


async def _export(
    context: RunContext,
    last_digest: str,
    *,
    store: AsyncStore,
    checkpoints: Checkpoints,
    threads: Threads,
) -> None:
    """Write the last model, and beside it the best one if that is another."""
    last = _exported(context.settings)
    await threads.on_disk(checkpoints.export, last_digest, last)
    best_digest = await store.best_model(context.run_id)
    if best_digest is not None and best_digest != last_digest:
        await threads.on_disk(checkpoints.export, best_digest, _beside(last))


def _exported(settings: ServerSettings) -> Path:
    """Return where the final model goes."""
    return settings.export or settings.state_dir / "model.safetensors"


def _show_end(settings: ServerSettings) -> None:
    if settings.summary and not _run_command(settings, "history", output=sys.stderr.fileno()):
        logger.warning("the rounds weren't shown; the run is complete all the same")
    console = stderr_console()
    console.print(f"the final model is in {_exported(settings)}", soft_wrap=True)
    if not settings.summary:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(
            "the curve isn't drawn: matplotlib isn't installed; install it with: "
            "python -m pip install 'fedrounds[plot]'"
        )
        return
    curve = settings.state_dir / "curve.png"
    if _run_command(settings, "curve", "--out", str(curve), output=subprocess.DEVNULL):
        console.print(f"accuracy and loss over the rounds are drawn in {curve}", soft_wrap=True)
    else:
        logger.warning("the curve wasn't drawn; the run is complete all the same")


def _run_command(settings: ServerSettings, name: str, *flags: str, output: int) -> bool:
    """Run a command that inspects the state-dir, and return whether it succeeded.

    In a process of its own: the whole history takes more memory than serving a small model.
    """
    command = [name, "--state-dir", str(settings.state_dir), *flags]
    done = subprocess.run([sys.executable, "-m", "fedserver", *command], stdout=output, check=False)
    return done.returncode == 0

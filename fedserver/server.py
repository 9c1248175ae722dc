"""Serves one run from its beginning, or from where it was, until it is done or is stopped."""

import asyncio
import contextlib
import functools
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fedrounds.cli import stderr_console
from fedrounds.errors import RunFailed, StorageDamaged
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.files import locked_folder, raise_file_limit
from fedrounds.memory import keep_one_heap
from fedrounds.stop_signals import StopSignals, interrupting
from fedrounds.types import RunEnd
from fedserver.api.service import start_server
from fedserver.composition import Composition, compose
from fedserver.events import event_of, log_event
from fedserver.housekeeping.recovery import note_absence, salvageable
from fedserver.models.checkpoints import Checkpoints
from fedserver.monitoring.terminal import showing_progress
from fedserver.preflight import (
    best_beside,
    expect_database,
    validate_export,
    validate_going_on,
)
from fedserver.prepared import Prepared, prepare
from fedserver.records import Run, RunState
from fedserver.run_context import RunContext
from fedserver.runtime import ServingClock, Threads
from fedserver.settings import ServerSettings, differing_settings
from fedserver.store import AsyncStore, Store

logger = logging.getLogger(__name__)

_GRACE_S = 1.0


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
        validate_export(settings.export)
    # Settings are refused before a run begins with them.
    with interrupting():
        prepared = prepare(settings)
    settings = settings.with_goal_of(prepared.task.best_by)
    with locked_folder(settings.state_dir) as state_dir:
        try:
            expect_database(state_dir)
            store = Store(state_dir / "federation.sqlite", upgrades=True)
            store.database.examine()
        except StorageDamaged as error:
            raise StorageDamaged(f"{error}; {salvageable(state_dir / 'models')}") from error
        threads = Threads()
        try:
            run = _open_run(store, settings)
            as_begun = settings.going_on_with(run.settings)
            if as_begun != settings:
                with interrupting():
                    prepared = prepare(as_begun)
            asyncio.run(
                _serve(
                    as_begun,
                    prepared,
                    run=run,
                    store=store,
                    threads=threads,
                    stop_signals=signals,
                )
            )
        finally:
            threads.close()
            store.close()


def _open_run(store: Store, settings: ServerSettings) -> Run:
    """Return the unfinished run, or begin the next run."""
    latest = store.runs.latest_run()
    if latest is None or latest.state is not RunState.OPEN:
        return store.runs.begin_run(settings.run_settings())
    differing = differing_settings(settings, latest.settings)
    if differing and store.rounds.latest_attempt(latest.run_id) is None:
        reason = "no round had begun when the server was started again with other settings"
        store.runs.end_run(latest.run_id, RunState.FAILED, event_of("run-failed", reason=reason))
        # Nobody listens to the store's events yet.
        for event in store.database.take_recorded():
            log_event(event)
        return store.runs.begin_run(settings.run_settings())
    validate_going_on(settings.state_dir, differing)
    logger.info("going on with %s", latest.run_id)
    return latest


async def _serve(
    settings: ServerSettings,
    prepared: Prepared,
    *,
    run: Run,
    store: Store,
    threads: Threads,
    stop_signals: StopSignals,
) -> None:
    clock = ServingClock()
    parts = compose(settings, prepared, run=run, store=store, threads=threads, clock=clock)
    stop = _stop_event(stop_signals)
    last_done = store.rounds.last_done_round(run.run_id)
    evaluated = store.rounds.good_evaluations(run.run_id, metrics=[settings.goal.name])
    spent_s = store.rounds.time_spent_s(run.run_id)
    server, address = await start_server(parts.client_api, host=settings.host, port=settings.port)
    completing = asyncio.create_task(_complete(parts, threads))
    stopping = asyncio.create_task(stop.wait())
    keeping_time = asyncio.create_task(
        clock.keep(functools.partial(note_absence, open_orders=parts.open_orders, disk=parts.disk))
    )
    try:
        print(f"fedserver listening on {address}", flush=True)
        with showing_progress(
            parts.bus,
            parts.open_orders,
            total_rounds=settings.rounds,
            num_done=0 if last_done is None else last_done.round_number,
            evaluated=evaluated,
            spent_s=spent_s,
            goal=settings.goal,
        ):
            await asyncio.wait({completing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        end_lines: list[str] = []
        if is_complete := completing.done():
            end_lines = await completing
        else:
            logger.info("stopping; the same command goes on with %s", run.run_id)
    finally:
        parts.client_api.stop()
        prepared.evaluator.stop()
        await server.stop(_GRACE_S)
        tasks = {completing, stopping, keeping_time}
        for task_left in tasks:
            task_left.cancel()
        await asyncio.wait(tasks)
    if is_complete:
        # Only now: while this takes its time no client is served, and no clock may notice that.
        _show_end(settings, end_lines)


def _stop_event(signals: StopSignals) -> asyncio.Event:
    """Return an event of this loop that is set when the process is asked to stop."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(stop.set)

    signals.when_asked(tell)
    return stop


async def _complete(parts: Composition, threads: Threads) -> list[str]:
    """Run the run to its end, export its models, and tell the clients.

    Returns what to say of the end, in sentences.
    """
    context, coordinator, client_api = parts.context, parts.coordinator, parts.client_api
    try:
        digest = await coordinator.complete()
    except RunFailed:
        _, failure = await parts.store.events.last_failure(context.run_id)
        await client_api.finish(RunEnd(has_failed=True, failure=failure))
        raise
    # Killed here, the run is still open: started again it exports and ends it.
    about_best = await coordinator.with_room(
        functools.partial(
            _export,
            context,
            digest,
            store=parts.store,
            checkpoints=parts.checkpoints,
            threads=threads,
        )
    )
    failpoint(FailPoint.RUN_EXPORTED)
    await coordinator.with_room(coordinator.end)
    await client_api.finish(RunEnd(has_failed=False))
    if (stop := coordinator.stopped) is None:
        return about_best
    num_rounds = context.settings.rounds
    return [
        f"the run stopped after round {stop.round_number} of {num_rounds}: {stop.reason}",
        *about_best,
    ]


async def _export(
    context: RunContext,
    last_digest: str,
    *,
    store: AsyncStore,
    checkpoints: Checkpoints,
    threads: Threads,
) -> list[str]:
    """Write the last model, and beside it the best model if that is another.

    Returns a sentence on the best model, if models were evaluated.
    """
    last = _exported(context.settings)
    await threads.on_disk(checkpoints.export, last_digest, last)
    goal = context.settings.goal
    best = await store.rounds.best_model(context.run_id, goal)
    if best is None:
        return []
    number, digest, value = best
    sentence = f"the best model by {goal} is that of round {number} ({goal.name} {value:.4g})"
    if digest == last_digest:
        return [f"{sentence}, the last one"]
    await threads.on_disk(checkpoints.export, digest, best_beside(last))
    return [f"{sentence}, in {best_beside(last)}"]


def _exported(settings: ServerSettings) -> Path:
    """Return the path of the final model."""
    return settings.export or settings.state_dir / "model.safetensors"


def _show_end(settings: ServerSettings, lines: Sequence[str]) -> None:
    if settings.summary and not _run_command(settings, "history", output=sys.stderr.fileno()):
        logger.warning("the rounds weren't shown; the run is complete all the same")
    console = stderr_console()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
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

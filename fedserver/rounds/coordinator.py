"""The round loop: safe to kill at any line and to start again.

    open (opening) -> collect (collecting) -> close, aggregate, record as DONE (closing) -> open ...

Each step rests on the phase that the store holds and can be repeated with the same result. The
transaction that records a round as DONE opens the next round. Evaluation goes on beside that round.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from fedrounds.errors import OutOfSpace, RunFailed
from fedrounds.files import unusable
from fedrounds.types import RunFailure
from fedserver.clients.open_orders import OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.housekeeping.recovery import note_restart
from fedserver.housekeeping.retention import Retention
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.models.evaluation import Evaluations
from fedserver.models.stopping import EarlyStop
from fedserver.phases import Phase, RoundEvent
from fedserver.quorum import updates_needed
from fedserver.records import Attempt, RunState
from fedserver.rounds.closing import Closer, latest_attempt
from fedserver.rounds.collecting import Collecting, wait_until_due
from fedserver.rounds.last_counted import LastCounted
from fedserver.rounds.opening import Opener
from fedserver.rounds.rollback import roll_back
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore

T = TypeVar("T")


_CLIENTS_DROPPED = {RunFailure.TOO_MANY_EXCLUDED, RunFailure.UPDATES_REFUSED}


class Coordinator:
    """Drives one run from its first round, or from where it was, to its end."""

    def __init__(
        self,
        context: RunContext,
        *,
        resume: Callable[[], Awaitable[tuple[Attempt, GlobalModel]]],
        tick_s: float,
        collecting: Collecting,
        opener: Opener,
        closer: Closer,
        evaluations: Evaluations,
        retention: Retention,
        last_counted: LastCounted,
        sessions: Sessions,
        open_orders: OpenOrders,
        store: AsyncStore,
        checkpoints: Checkpoints,
        disk: DiskWatch,
        threads: Threads,
    ) -> None:
        """`resume` returns the attempt with which the run goes on; see fedserver.rounds.resuming.

        Every `tick_s` seconds it gives stalled orders up, and tries again what the disk refused.
        """
        self._context = context
        self._resume = resume
        self._tick_s = tick_s
        self._collecting = collecting
        self._opener = opener
        self._closer = closer
        self._evaluations = evaluations
        self._retention = retention
        self._last_counted = last_counted
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._checkpoints = checkpoints
        self._disk = disk
        self._threads = threads
        self._stopped: EarlyStop | None = None

    async def complete(self) -> str:
        """Run every round that is left, or until the run stops early; return the last digest.

        An error of the operating system that may pass, such as a full disk, stops it where a kill
        would; it goes on when that is over.

        Raises:
            RunFailed: a round failed as often as it may be tried.
            StorageUnusable: a file may not be used or isn't there; the run stays open.
            StorageDamaged: what the store or the folders hold isn't what was written.
        """
        await self.with_room(partial(note_restart, self._store, self._context.run_id))
        return await self.with_room(self._run_rounds)

    async def with_room(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step, and repeat it until the operating system lets it succeed.

        Raises:
            StorageUnusable: it can't succeed before a person has mended something.
        """
        while True:
            try:
                return await step()
            except (OutOfSpace, OSError) as error:
                lasting = unusable(error) if isinstance(error, OSError) else None
                if lasting is not None:
                    await self._disk.note_end("the round loop", lasting)
                    raise lasting from error
                await self._disk.note_failure("the round loop", error)
                await asyncio.sleep(self._tick_s)

    @property
    def stopped(self) -> EarlyStop | None:
        """Where the run has stopped before its last round, and why; None if it didn't."""
        return self._stopped

    async def end(self) -> None:
        """Record that the run is over."""
        await self._store.runs.end_run(
            self._context.run_id,
            RunState.FINISHED,
            event_of(
                "run-finished",
                stopped_after=self._stopped and self._stopped.round_number,
                reason=self._stopped and self._stopped.reason,
            ),
        )
        self._open_orders.close_round()

    # ---- steps

    async def _run_rounds(self) -> str:
        current, base = await self._resume()
        while True:
            is_last = (
                current.phase is Phase.DONE
                and current.round_number == self._context.settings.rounds
            )
            if is_last:
                await self._evaluations.done()
            # Looked at before each step: no step rests on a model that is known to be bad.
            bad = await self._evaluations.take_bad_round(self._context.run_id)
            if bad is not None:
                current, base = await self._roll_back(bad, current)
            elif is_last:
                # Its evaluation may have made another model the best.
                await self._retention.drop_models(done_round=current.round_number)
                return base.digest
            elif stop := await self._evaluations.take_early_stop(self._context.run_id):
                await self._stop_early(stop, current)
                return base.digest
            elif current.phase is Phase.COLLECTING:
                current = await self._collect(current)
            elif current.phase is Phase.AGGREGATING:
                current, base = await self._closer.finish(current, base)
            else:
                current, base = await self._open_next(current, base)

    async def _collect(self, current: Attempt) -> Attempt:
        """Wait until the round closes or fails; returns the attempt as it stands then.

        The attempt is unchanged if its base may be bad.
        """
        due = await wait_until_due(
            current,
            self._collecting,
            settings=self._context.settings,
            evaluations=self._evaluations,
            sessions=self._sessions,
            open_orders=self._open_orders,
            store=self._store,
            tick_s=self._tick_s,
        )
        if due is None:
            return current
        if due.event is RoundEvent.CLOSE:
            return await self._closer.close(current)
        return await self._closer.fail(current, due.reason, failure=due.failure)

    async def _open_next(self, ended: Attempt, base: GlobalModel) -> tuple[Attempt, GlobalModel]:
        """Open the attempt that follows an attempt that has ended, if there may be another.

        Raises:
            RunFailed: the round has failed as often as it may.
        """
        round_number = ended.round_number + (ended.phase is Phase.DONE)
        phases = await self._store.rounds.phases_of(ended.run_id, round_number)
        if phases.count(Phase.FAILED) >= self._context.settings.max_attempts:
            await self._fail_run(ended)
        return await self._opener.open_next(ended, base, attempt=len(phases) + 1)

    async def _roll_back(self, bad: Attempt, current: Attempt) -> tuple[Attempt, GlobalModel]:
        """Take the bad round's model back; return the attempt to go on from, and its base."""
        await roll_back(
            bad,
            current,
            max_adjustments=self._context.settings.max_adjustments,
            store=self._store,
            open_orders=self._open_orders,
        )
        await self._retention.drop_updates(done_round=bad.round_number - 1)
        latest = await latest_attempt(self._store, bad.run_id)
        base = await self._threads.on_disk(
            self._checkpoints.load, bad.base_digest, state_digest=bad.base_state_digest
        )
        # What counted in the round doesn't any more.
        await self._last_counted.read()
        return latest, base

    async def _stop_early(self, stop: EarlyStop, current: Attempt) -> None:
        """End the rounds with the last model; the attempt that goes on with it is abandoned.

        The model is the base of that attempt: a round isn't finished before the model that it began
        with was evaluated.
        """
        if current.phase in (Phase.COLLECTING, Phase.AGGREGATING):
            event = event_of("round-unneeded", current, reason=stop.reason)
            await self._store.rounds.abandon_round(current, event)
            # After the transaction: until then the store has the orders open.
            self._open_orders.abandon_round(current)
        self._stopped = stop
        await self._retention.drop_updates(done_round=stop.round_number)
        await self._retention.drop_models(done_round=stop.round_number)

    async def _fail_run(self, failed: Attempt) -> None:
        event = event_of("run-failed", failed, is_incident=True)
        await self._store.runs.end_run(self._context.run_id, RunState.FAILED, event)
        reason, failure = await self._store.events.last_failure(self._context.run_id)
        advice = ""
        needed = updates_needed(self._context.settings)
        if failure in _CLIENTS_DROPPED and needed > 1:
            advice = (
                f"Each attempt needed {needed} updates and called such clients back: start the run "
                f"without them, or with --min-updates below {needed}. "
            )
        raise RunFailed(
            f"round {failed.round_number} failed {self._context.settings.max_attempts} times, the "
            f"last time because of this: {reason}. {advice}See more with `python -m fedserver "
            f"history --state-dir {self._context.settings.state_dir}`"
        )

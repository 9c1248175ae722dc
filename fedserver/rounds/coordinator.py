"""The round loop: safe to kill at any line and to start again.

    choose a cohort -> collect -> close -> aggregate -> DONE and the next round, one transaction

Each step rests on the phase that the store holds and can be repeated with the same result.
Evaluation goes on beside the next round.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

from fedrounds.errors import OutOfSpace, RunFailed, StorageDamaged
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.files import unusable
from fedrounds.strategies.components import UnfitCohort
from fedrounds.tasks.task import Task
from fedrounds.types import EntryKind, IncidentKind, RunFailure
from fedserver.api.downloads import Downloads
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.housekeeping.recovery import damaged_updates, note_restart
from fedserver.housekeeping.retention import drop_models, drop_updates
from fedserver.models.aggregation import reduce_updates
from fedserver.models.checkpoints import Checkpoints, GlobalModel, NonFiniteAggregate
from fedserver.models.client_metrics import client_events, summarise_clients
from fedserver.models.evaluation import Evaluations, Evaluator, may_be_repeated
from fedserver.numbers import numbers_text
from fedserver.phases import (
    OrderState,
    Phase,
    RoundEvent,
    due_event,
    due_of_buffer,
    shortfall,
)
from fedserver.records import NO_ADJUSTMENTS, Exclusion, Round, RunState
from fedserver.rounds.open_orders import OpenOrders
from fedserver.rounds.opening import Opener, opened_event
from fedserver.rounds.planning import stale_before, standings_after, updates_needed
from fedserver.rounds.rollback import decide_after, first_model, roll_back
from fedserver.rounds.stalls import give_up_orders
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.screening import compared_rounds, screen
from fedserver.updates.spool import Spool

T = TypeVar("T")

_MAX_TICK_S = 1.0


class Coordinator:
    """Drives one run from its first round, or from where it was, to its end."""

    def __init__(
        self,
        context: RunContext,
        *,
        task: Task,
        evaluator: Evaluator,
        sessions: Sessions,
        open_orders: OpenOrders,
        store: AsyncStore,
        spool: Spool,
        quarantine: QuarantineFolder,
        checkpoints: Checkpoints,
        downloads: Downloads,
        disk: DiskWatch,
        threads: Threads,
    ) -> None:
        settings = context.settings
        self._context = context
        self._task = task
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._spool = spool
        self._quarantine = quarantine
        self._checkpoints = checkpoints
        self._downloads = downloads
        self._disk = disk
        self._threads = threads
        is_used = not (context.strategy.is_personal or EntryKind.LOCAL in context.kinds.values())
        self._evaluations = Evaluations(
            evaluator,
            max_rollbacks=settings.max_rollbacks,
            raises_alarms=is_used,
            store=store,
            checkpoints=checkpoints,
            open_orders=open_orders,
            threads=threads,
        )
        shortest_s = min(settings.stall_after, settings.first_step, settings.lease)
        self._tick_s = min(_MAX_TICK_S, shortest_s / 4)
        self._opener = Opener(
            context,
            task,
            tick_s=self._tick_s,
            sessions=sessions,
            open_orders=open_orders,
            store=store,
            checkpoints=checkpoints,
            downloads=downloads,
            disk=disk,
            threads=threads,
        )

    async def complete(self) -> str:
        """Run every round that is left; returns the final model's digest.

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
        """Take a step that can be repeated, again and again until the operating system lets it.

        Raises:
            StorageUnusable: it won't let it before a person has mended something.
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

    async def end(self) -> None:
        """Record that the run is over."""
        await self._store.end_run(
            self._context.run_id,
            RunState.FINISHED,
            event_of("run-finished"),
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
            if (bad := await self._bad_round()) is not None:
                current, base = await self._roll_back(bad, current)
            elif is_last:
                # Its evaluation may have made another model the best.
                await self._drop_models(done_round=current.round_number)
                return base.digest
            elif current.phase is Phase.COLLECTING:
                current = await self._collect(current)
            elif current.phase is Phase.AGGREGATING:
                current, base = await self._aggregate(current, base)
            else:
                current, base = await self._open_next(current, base)

    async def _bad_round(self) -> Round | None:
        """Return the last round done if its evaluation says that it is to be rolled back."""
        if not self._evaluations.has_alarm:
            return None
        self._evaluations.has_alarm = False
        bad = await self._store.alarmed_round(self._context.run_id)
        if bad is None:
            return None
        max_rollbacks = self._context.settings.max_rollbacks
        is_next = await may_be_repeated(bad, store=self._store, max_rollbacks=max_rollbacks)
        return bad if is_next else None

    async def _roll_back(self, bad: Round, current: Round) -> tuple[Round, GlobalModel]:
        """Take the bad round's model back; returns the attempt to go on from, and its base."""
        await roll_back(
            bad,
            current,
            max_adjustments=self._context.settings.max_adjustments,
            store=self._store,
            open_orders=self._open_orders,
        )
        await self._drop_updates(done_round=bad.round_number - 1)
        latest = await self._latest()
        base = await self._threads.on_disk(
            self._checkpoints.load, bad.base_digest, state_digest=bad.base_state_digest
        )
        await self._opener.look_back()
        return latest, base

    async def _resume(self) -> tuple[Round, GlobalModel]:
        """Take the run up where the store says that it is; open its first round if there is none.

        Raises:
            StorageDamaged: the base model, or an update acknowledged, isn't what was written.
        """
        on_disk = self._threads.on_disk
        store, run_id = self._store, self._context.run_id
        latest = await store.latest_round(run_id)
        await self._opener.look_back()
        held = await store.held_updates()
        await on_disk(self._quarantine.tidy, held)
        await self._drop_updates(done_round=0 if latest is None else latest.round_number - 1)
        # One that was found before a restart may not have been acted on.
        self._evaluations.has_alarm = True
        if latest is None:
            base = await first_model(
                self._task,
                self._context.settings,
                num_redraws=0,
                checkpoints=self._checkpoints,
                threads=self._threads,
            )
            return await self._opener.open(1, base, NO_ADJUSTMENTS), base
        digest, state_digest = latest.base_digest, latest.base_state_digest
        if latest.phase is Phase.DONE:
            assert latest.model_digest is not None
            digest, state_digest = latest.model_digest, latest.state_digest
        base = await on_disk(self._checkpoints.load, digest, state_digest=state_digest)
        if latest.phase in (Phase.COLLECTING, Phase.AGGREGATING):
            stored = await store.stored_updates(latest)
            damaged = await on_disk(damaged_updates, self._spool, stored)
            if damaged:
                latest = await self._give_up_damaged(latest, damaged)
        for done in await store.unevaluated_rounds(run_id):
            assert done.model_digest is not None
            await self._evaluations.start(done, done.model_digest)
        if latest.phase is Phase.COLLECTING:
            await self._opener.hand_out(latest, base)
        return latest, base

    async def _give_up_damaged(self, latest: Round, damaged: list[str]) -> Round:
        """Fail the attempt whose updates are damaged, if that was asked for."""
        if not self._context.settings.give_up_damaged:
            raise StorageDamaged(
                f"round {latest.round_number} can't go on: {'; '.join(damaged)}. Nothing was "
                "deleted: restore the files from a copy, or start with --give-up-damaged to ask "
                "the clients for this round anew; every finished round is whole"
            )
        return await self._fail_round(
            latest,
            f"damaged on the disk: {'; '.join(damaged)}",
            failure=RunFailure.UPDATES_DAMAGED,
        )

    async def _open_next(self, ended: Round, base: GlobalModel) -> tuple[Round, GlobalModel]:
        """Open the attempt that follows one that has ended, if it may be tried again.

        Raises:
            RunFailed: the round has failed as often as it may.
        """
        number = ended.round_number + (ended.phase is Phase.DONE)
        phases = await self._store.phases_of(ended.run_id, number)
        if phases.count(Phase.FAILED) >= self._context.settings.max_attempts:
            await self._fail_run(ended)
        return await self._opener.open_next(ended, base, attempt=len(phases) + 1)

    async def _collect(self, current: Round) -> Round:
        """Wait for updates until the round closes or fails, or its base turns out to be bad."""
        looked_at = -math.inf
        while True:
            if self._evaluations.has_alarm:
                return current
            # All orders are looked at: once a tick, not after each update that comes.
            if (now := time.monotonic()) - looked_at >= self._tick_s:
                looked_at = now
                await give_up_orders(
                    self._context.settings,
                    run_id=self._context.run_id,
                    sessions=self._sessions,
                    open_orders=self._open_orders,
                    store=self._store,
                )
            if self._context.is_asynchronous:
                due, reason = await self._due_of_buffer()
            else:
                due, reason = self._due(current)
            if due is RoundEvent.CLOSE:
                happened = event_of("round-closed", current)
                failpoint(FailPoint.ROUND_CLOSING)
                await self._store.close_round(
                    current,
                    happened,
                    carries_over=self._context.is_asynchronous,
                )
                failpoint(FailPoint.ROUND_CLOSED)
                break
            if due is RoundEvent.FAIL:
                return await self._fail_for_want_of_updates(current, reason)
            await self._open_orders.round_changed.wait(self._tick_s)
        if self._context.is_asynchronous:
            self._opener.note_stored()
        self._open_orders.close_round(carries_over=self._context.is_asynchronous)
        return await self._latest()

    def _due(self, current: Round) -> tuple[RoundEvent | None, str]:
        """Return what is to happen to a round that collects, and why where it fails."""
        settings, states = self._context.settings, self._open_orders.states()
        needed, deadline_s = updates_needed(settings, current), settings.round_deadline
        due = due_event(
            states,
            min_updates=needed,
            closes_early=settings.over_select > 1,
            is_overdue=deadline_s is not None and self._open_orders.age_s() > deadline_s,
        )
        return due, shortfall(states, needed) if due is RoundEvent.FAIL else ""

    async def _due_of_buffer(self) -> tuple[RoundEvent | None, str]:
        """Give further orders if the buffer isn't full; return what is to happen, and why."""
        size, open_orders = self._context.strategy.buffer_size, self._open_orders
        # Once it is full, they are better given with the model that comes out of it.
        due = due_of_buffer(open_orders.states(), buffer_size=size, can_go_on=True)
        if due is None:
            can_go_on = await self._opener.give_more()
            due = due_of_buffer(open_orders.states(), buffer_size=size, can_go_on=can_go_on)
        num_stored = sum(state is OrderState.STORED for state in open_orders.states())
        return due, (
            f"{num_stored} of {size} updates are there, nobody is at work, and whoever is here "
            "has given up or sits out"
        )

    async def _fail_for_want_of_updates(self, current: Round, reason: str) -> Round:
        """Fail an attempt that has too few updates; where refusals are why, its reason names them.

        They are why if there would be enough updates without them. An asynchronous round asks
        further clients as long as it can, so in one any refusal is.
        """
        orders, states = self._open_orders.list_all(), self._open_orders.states()
        refused = {
            one.order.client_id: one.order.order_id
            for one in orders
            if one.state is OrderState.REFUSED
        }
        if not refused:
            return await self._fail_round(current, reason, failure=RunFailure.TOO_FEW_UPDATES)
        first = min(refused)
        record = await self._store.find_order(refused[first])
        reason += f"; {_verdict_text('refused', refused, f'{record.reason}')}"
        num_without_end = len(states) - states.count(OrderState.ABANDONED)
        is_why = self._context.is_asynchronous or num_without_end >= updates_needed(
            self._context.settings, current
        )
        failure = RunFailure.UPDATES_REFUSED if is_why else RunFailure.TOO_FEW_UPDATES
        return await self._fail_round(current, reason, failure=failure)

    async def _aggregate(self, current: Round, base: GlobalModel) -> tuple[Round, GlobalModel]:
        """Make the next global model and open the round after it."""
        settings, store, run_id = self._context.settings, self._store, current.run_id
        on_disk = self._threads.on_disk
        # Nothing is to rest on a model that turns out to be bad.
        await self._evaluations.done()
        if self._evaluations.has_alarm:
            return current, base
        stored = await store.stored_updates(current)
        exclusions = screen(
            current,
            stored,
            before=await store.counted_updates(
                run_id, compared_rounds(current.round_number, stored)
            ),
            settings=self._context.run.settings,
            model_norm=base.parameter_norm,
            trusted=await store.trusted_clients(run_id),
        )
        excluded = {one.order_id for one in exclusions}
        counted = [one for one in stored if one.update.order_id not in excluded]
        needed = min(settings.updates_needed, len(current.orders))
        if len(counted) < (1 if self._context.is_asynchronous else needed):
            reason = f"{len(excluded)} of {len(stored)} updates were excluded, too many to go on"
            if exclusions:
                first = min(exclusions, key=lambda one: one.client_id)
                clients = {one.client_id for one in exclusions}
                reason += f"; {_verdict_text('excluded', clients, first.refusal.reason)}"
            failed = await self._fail_round(
                current, reason, failure=RunFailure.TOO_MANY_EXCLUDED, exclusions=exclusions
            )
            return failed, base
        try:
            model, bounded = await on_disk(
                reduce_updates,
                self._context,
                current,
                base,
                counted,
                spool=self._spool,
                checkpoints=self._checkpoints,
            )
        except (NonFiniteAggregate, UnfitCohort) as error:
            # Excluded they stay: the next attempt doesn't ask their clients.
            is_bad = isinstance(error, NonFiniteAggregate)
            failed = await self._fail_round(
                current,
                str(error),
                failure=RunFailure.NOT_AGGREGATED,
                exclusions=exclusions,
                is_model_bad=is_bad,
            )
            return failed, base
        failpoint(FailPoint.MODEL_WRITTEN)
        if not self._context.is_asynchronous:
            counted_last = {one.client_id: one.update.order_id for one in counted}
            self._opener.last_counted.update(counted_last)
        decision = await decide_after(self._context, current, store=store, is_done=True)
        following = None
        if current.round_number < settings.rounds:
            standings = await store.standings(run_id)
            following = await self._opener.plan(
                current.round_number + 1,
                attempt=1 + len(await store.phases_of(run_id, current.round_number + 1)),
                base=model,
                adjustments=decision.adjustments,
                standings=standings_after(
                    standings,
                    current,
                    exclusions,
                    {update.client_id for update in counted},
                ),
            )
        told = summarise_clients(
            [one.update for one in counted if not one.staleness], holdout=settings.holdout
        )
        happened = [
            *client_events(current, told),
            *bounded,
            event_of("round-done", current, updates=len(counted), model=model.digest),
            *decision.events,
        ]
        if following is not None:
            happened.append(opened_event(following))
        await store.finish_round(
            current,
            model_digest=model.digest,
            state_digest=model.state_digest,
            adjustments_after=decision.adjustments,
            exclusions=exclusions,
            client_evaluation=told,
            next_round=following,
            stale_before=stale_before(settings, current.round_number + 1),
            happened=happened,
        )
        failpoint(FailPoint.ROUND_DONE)
        if self._context.is_asynchronous and exclusions:
            # They were taken to count when they were stored.
            await self._opener.look_back()
        if following is not None:
            await self._opener.hand_out(following, model)
        await self._drop_updates(done_round=current.round_number)
        await self._evaluations.start(current, model.digest)
        await self._drop_models(done_round=current.round_number)
        return following or await self._latest(), model

    async def _fail_round(
        self,
        current: Round,
        reason: str,
        *,
        failure: RunFailure,
        exclusions: Sequence[Exclusion] = (),
        is_model_bad: bool = False,
    ) -> Round:
        decision = await decide_after(
            self._context,
            current,
            store=self._store,
            is_done=False,
            is_model_bad=is_model_bad,
        )
        happened = event_of(
            IncidentKind.ROUND_FAILED, current, is_incident=True, reason=reason, failure=failure
        )
        await self._store.fail_round(
            current,
            [happened, *decision.events],
            adjustments_after=decision.adjustments,
            exclusions=exclusions,
            is_base_blamed=decision.is_base_blamed,
        )
        failpoint(FailPoint.ROUND_FAILED)
        self._open_orders.abandon_round(current)
        if self._context.is_asynchronous:
            await self._opener.look_back()
        self._evaluations.has_alarm |= decision.is_base_blamed
        await self._drop_updates(done_round=current.round_number - 1)
        return await self._latest()

    async def _drop_updates(self, *, done_round: int) -> None:
        await drop_updates(
            self._context,
            done_round=done_round,
            open_orders=self._open_orders,
            store=self._store,
            spool=self._spool,
            quarantine=self._quarantine,
            threads=self._threads,
        )

    async def _drop_models(self, *, done_round: int) -> None:
        await drop_models(
            self._context,
            done_round=done_round,
            store=self._store,
            checkpoints=self._checkpoints,
            downloads=self._downloads,
            threads=self._threads,
        )

    async def _fail_run(self, current: Round) -> None:
        happened = event_of("run-failed", current, is_incident=True)
        await self._store.end_run(self._context.run_id, RunState.FAILED, happened)
        reason, _ = await self._store.last_failure(self._context.run_id)
        raise RunFailed(
            f"round {current.round_number} failed {self._context.settings.max_attempts} times, the "
            f"last time because of this: {reason}. See more with `python -m fedserver history "
            f"--state-dir {self._context.settings.state_dir}`"
        )

    async def _latest(self) -> Round:
        latest = await self._store.latest_round(self._context.run_id)
        assert latest is not None
        return latest


def _verdict_text(verdict: str, clients: Collection[int], first_reason: str) -> str:
    """Return whose updates were refused or excluded, and why that of the first client was."""
    first = min(clients)
    if len(clients) == 1:
        return f"the update of client {first} was {verdict}: {first_reason}"
    return (
        f"the updates of clients {numbers_text(clients)} were {verdict}, that of client {first}: "
        f"{first_reason}"
    )

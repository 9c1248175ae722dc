"""The round loop: safe to kill at any line and to start again.

    choose a cohort -> collect -> close -> aggregate -> DONE and the next round, one transaction

Each step rests on the phase that the store holds and can be repeated with the same result.
Evaluation goes on beside the next round.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fedserver.aggregation import reduce_updates, screen
from fedserver.checkpoints import GlobalModel, NonFiniteAggregate
from fedserver.evaluation import Evaluations, Evaluator, may_be_repeated
from fedserver.events import event_of
from fedserver.parts import Parts
from fedserver.patience import give_up_orders
from fedserver.planning import (
    admission_limits,
    participation,
    plan_round,
    standings_after,
    updates_needed,
    work_orders,
)
from fedserver.records import NO_ADJUSTMENTS, Adjustments, Exclusion, Round, RunState
from fedserver.recovery import damaged_updates, note_restart
from fedserver.retention import drop_models, drop_updates
from fedserver.rollback import consequences_of, first_model, roll_back
from fedserver.rounds import Phase, RoundEvent, due_event, shortfall
from fedserver.spread import client_events, summarise_clients
from fedserver.strategies import find_strategy
from fedserver.strategies.rows import UnfitCohort
from shared.errors import OutOfSpace, RunFailed, StorageDamaged
from shared.failpoints import FailPoint, pass_by
from shared.tasks import Task
from shared.types import IncidentKind

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_TICK_S = 1.0


class Coordinator:
    """Drives one run from its first round, or from where it was, to its end."""

    def __init__(self, parts: Parts, *, task: Task, evaluator: Evaluator) -> None:
        settings = parts.settings
        self._parts = parts
        self._task = task
        self._evaluations = Evaluations(parts, evaluator)
        self._strategy = find_strategy(parts.run.settings)
        self._last_counted: dict[int, str] = {}
        self._tick_s = min(_MAX_TICK_S, settings.stall_after / 4, settings.lease / 4)

    async def complete(self) -> str:
        """Run every round that is left; returns the final model's digest.

        A full disk stops it where a kill would; it goes on when there is room.

        Raises:
            RunFailed: a round failed as often as it may be tried.
            StorageDamaged: what the store or the folders hold isn't what was written.
        """
        await note_restart(self._parts)
        return await self.with_room(self._run_rounds)

    async def with_room(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step that can be repeated, again and again until the disk has room for it."""
        while True:
            try:
                return await step()
            except OutOfSpace as error:
                await self._parts.disk.note_full(error)
                await asyncio.sleep(self._tick_s)

    async def end(self) -> None:
        """Record that the run is over."""
        await self._parts.workers.in_store(
            self._parts.store.end_run,
            self._parts.run.run_id,
            RunState.FINISHED,
            event_of("run-finished"),
        )

    # ---- steps

    async def _run_rounds(self) -> str:
        current, base = await self._resume()
        while True:
            is_last = (
                current.phase is Phase.DONE and current.round_number == self._parts.settings.rounds
            )
            if is_last:
                await self._evaluations.done()
            if (bad := await self._bad_round()) is not None:
                current, base = await self._roll_back(bad, current)
            elif is_last:
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
        bad = await self._parts.workers.in_store(
            self._parts.store.alarmed_round, self._parts.run.run_id
        )
        return bad if bad is not None and await may_be_repeated(self._parts, bad) else None

    async def _roll_back(self, bad: Round, current: Round) -> tuple[Round, GlobalModel]:
        latest, base = await roll_back(self._parts, bad, current)
        self._last_counted = await self._parts.workers.in_store(
            self._parts.store.last_counted_orders, self._parts.run.run_id
        )
        return latest, base

    async def _resume(self) -> tuple[Round, GlobalModel]:
        """Take the run up where the store says that it is; open its first round if there is none.

        Raises:
            StorageDamaged: the base model, or an update acknowledged, isn't what was written.
        """
        in_store, on_disk = self._parts.workers.in_store, self._parts.workers.on_disk
        store, run_id = self._parts.store, self._parts.run.run_id
        latest = await in_store(store.latest_round, run_id)
        self._last_counted = await in_store(store.last_counted_orders, run_id)
        held = await in_store(store.held_updates)
        await on_disk(self._parts.quarantine.tidy, held)
        await drop_updates(self._parts, done_round=0 if latest is None else latest.round_number - 1)
        # One that was found before a restart may not have been acted on.
        self._evaluations.has_alarm = True
        if latest is None:
            base = await first_model(self._parts, self._task, num_redraws=0)
            return await self._open(1, base, NO_ADJUSTMENTS), base
        digest, state_digest = latest.base_digest, latest.base_state_digest
        if latest.phase is Phase.DONE:
            assert latest.model_digest is not None
            digest, state_digest = latest.model_digest, latest.state_digest
        base = await on_disk(self._parts.checkpoints.load, digest, state_digest=state_digest)
        if latest.phase in (Phase.COLLECTING, Phase.AGGREGATING):
            stored = await in_store(store.stored_updates, latest)
            damaged = await on_disk(damaged_updates, self._parts.spool, stored)
            if damaged:
                latest = await self._give_up_damaged(latest, damaged)
        for done in await in_store(store.unevaluated_rounds, run_id):
            assert done.model_digest is not None
            await self._evaluations.start(done, done.model_digest)
        if latest.phase is Phase.COLLECTING:
            self._hand_out(latest, base)
        return latest, base

    async def _give_up_damaged(self, latest: Round, damaged: list[str]) -> Round:
        """Fail the attempt whose updates are damaged, if that was asked for."""
        if not self._parts.settings.give_up_damaged:
            raise StorageDamaged(
                f"round {latest.round_number} can't go on: {'; '.join(damaged)}. Nothing was "
                "deleted: restore the files from a copy, or start with --give-up-damaged to ask "
                "the clients for this round anew; every finished round is whole"
            )
        return await self._fail_round(latest, f"damaged on the disk: {'; '.join(damaged)}")

    async def _open_next(self, ended: Round, base: GlobalModel) -> tuple[Round, GlobalModel]:
        """Open the attempt that follows one that has ended, and return it with its base.

        Raises:
            RunFailed: the round has failed as often as it may.
        """
        number = ended.round_number + (ended.phase is Phase.DONE)
        phases = await self._parts.workers.in_store(
            self._parts.store.phases_of, ended.run_id, number
        )
        if phases.count(Phase.FAILED) >= self._parts.settings.max_attempts:
            await self._fail_run(ended)
        adjustments = ended.adjustments_after
        if adjustments.num_redraws > ended.adjustments.num_redraws:
            base = await first_model(self._parts, self._task, num_redraws=adjustments.num_redraws)
        return await self._open(number, base, adjustments, attempt=len(phases) + 1), base

    async def _open(
        self, round_number: int, base: GlobalModel, adjustments: Adjustments, *, attempt: int = 1
    ) -> Round:
        """Wait until there are clients enough, then open the round."""
        num_said: int | None = None
        run_id = self._parts.run.run_id
        while True:
            await self._parts.disk.tell()
            standings = await self._parts.workers.in_store(self._parts.store.standings, run_id)
            planned = plan_round(
                *(self._parts, round_number),
                attempt=attempt,
                base=base,
                adjustments=adjustments,
                standings=standings,
                past=await participation(self._parts),
            )
            if planned is not None:
                break
            num_here = len(self._parts.sessions.ready_clients(only_live=True))
            if num_here != num_said and not self._parts.disk.is_low():
                needed = self._parts.settings.min_clients
                logger.info("waiting for clients: %d of %d are here", num_here, needed)
                num_said = num_here
            await self._parts.sessions.changed.wait(self._tick_s)
        happened = event_of("round-opened", planned, clients=len(planned.orders))
        await self._parts.workers.in_store(self._parts.store.open_round, planned, happened)
        pass_by(FailPoint.ROUND_OPENED)
        self._hand_out(planned, base)
        self._parts.bus.publish(happened)
        return planned

    def _hand_out(self, opened: Round, base: GlobalModel) -> None:
        self._parts.downloads.publish(base.digest)
        self._parts.book.open_round(
            opened,
            base=base,
            limits=admission_limits(self._parts.settings, opened),
            orders=work_orders(
                *(self._parts.settings, opened, base, self._last_counted),
                local_rule=self._strategy.local_rule,
            ),
        )

    async def _collect(self, current: Round) -> Round:
        """Wait for updates until the round closes or fails, or its base turns out to be bad."""
        while True:
            if self._evaluations.has_alarm:
                return current
            await give_up_orders(self._parts)
            deadline_s = self._parts.settings.round_deadline
            states, needed = (
                self._parts.book.states(),
                updates_needed(self._parts.settings, current),
            )
            due = due_event(
                states,
                min_updates=needed,
                closes_early=self._parts.settings.over_select > 1,
                is_overdue=deadline_s is not None and self._parts.book.age_s() > deadline_s,
            )
            if due is RoundEvent.CLOSE:
                happened = event_of("round-closed", current)
                pass_by(FailPoint.ROUND_CLOSING)
                await self._parts.workers.in_store(self._parts.store.close_round, current, happened)
                pass_by(FailPoint.ROUND_CLOSED)
                break
            if due is RoundEvent.FAIL:
                return await self._fail_round(current, shortfall(states, needed))
            await self._parts.book.round_changed.wait(self._tick_s)
        self._parts.book.close_round()
        self._parts.bus.publish(happened)
        return await self._latest()

    async def _aggregate(self, current: Round, base: GlobalModel) -> tuple[Round, GlobalModel]:
        """Make the next global model and open the round after it."""
        settings, store, run_id = self._parts.settings, self._parts.store, current.run_id
        in_store, on_disk = self._parts.workers.in_store, self._parts.workers.on_disk
        # Nothing is to rest on a model that turns out to be bad.
        await self._evaluations.done()
        if self._evaluations.has_alarm:
            return current, base
        stored = await in_store(store.stored_updates, current)
        exclusions = screen(
            current,
            stored,
            width=settings.norm_band * current.adjustments.norm_band_factor,
            trusted=await in_store(store.trusted_clients, run_id),
        )
        excluded = {one.order_id for one in exclusions}
        counted = [one for one in stored if one.update.order_id not in excluded]
        if len(counted) < min(settings.updates_needed, len(current.orders)):
            reason = f"{len(excluded)} of {len(stored)} updates were excluded, too many to go on"
            return await self._fail_round(current, reason, exclusions=exclusions), base
        try:
            model = await on_disk(
                reduce_updates, self._parts, self._strategy, current, base, counted
            )
        except (NonFiniteAggregate, UnfitCohort) as error:
            # Excluded they stay: the next attempt doesn't ask their clients.
            is_bad = isinstance(error, NonFiniteAggregate)
            failed = await self._fail_round(
                current, str(error), exclusions=exclusions, is_model_bad=is_bad
            )
            return failed, base
        pass_by(FailPoint.MODEL_WRITTEN)
        self._last_counted.update({one.client_id: one.update.order_id for one in counted})
        follows = await consequences_of(self._parts, current, is_done=True)
        following = None
        if current.round_number < settings.rounds:
            standings = await in_store(store.standings, run_id)
            following = plan_round(
                self._parts,
                current.round_number + 1,
                attempt=1 + len(await in_store(store.phases_of, run_id, current.round_number + 1)),
                base=model,
                adjustments=follows.adjustments,
                standings=standings_after(
                    standings, current, exclusions, {one.client_id for one in counted}
                ),
                past=await participation(self._parts),
            )
        told = summarise_clients([one.update for one in counted], holdout=settings.holdout)
        happened = [
            *client_events(current, told),
            event_of("round-done", current, updates=len(counted), model=model.digest),
            *follows.happened,
        ]
        if following is not None:
            happened.append(event_of("round-opened", following, clients=len(following.orders)))
        happened = await in_store(
            store.finish_round,
            current,
            model_digest=model.digest,
            state_digest=model.state_digest,
            adjustments_after=follows.adjustments,
            exclusions=exclusions,
            client_evaluation=told,
            next_round=following,
            happened=happened,
        )
        pass_by(FailPoint.ROUND_DONE)
        if following is not None:
            self._hand_out(following, model)
        for one in happened:
            self._parts.bus.publish(one)
        await drop_updates(self._parts, done_round=current.round_number)
        await self._evaluations.start(current, model.digest)
        await drop_models(self._parts, done_round=current.round_number)
        return following or await self._latest(), model

    async def _fail_round(
        self,
        current: Round,
        reason: str,
        *,
        exclusions: Sequence[Exclusion] = (),
        is_model_bad: bool = False,
    ) -> Round:
        follows = await consequences_of(
            self._parts, current, is_done=False, is_model_bad=is_model_bad
        )
        happened = event_of(IncidentKind.ROUND_FAILED, current, is_incident=True, reason=reason)
        recorded = await self._parts.workers.in_store(
            self._parts.store.fail_round,
            current,
            [happened, *follows.happened],
            adjustments_after=follows.adjustments,
            exclusions=exclusions,
        )
        pass_by(FailPoint.ROUND_FAILED)
        self._parts.book.close_round()
        for one in recorded:
            self._parts.bus.publish(one)
        await drop_updates(self._parts, done_round=current.round_number - 1)
        return await self._latest()

    async def _fail_run(self, current: Round) -> None:
        happened = event_of("run-failed", current, is_incident=True)
        await self._parts.workers.in_store(
            self._parts.store.end_run, self._parts.run.run_id, RunState.FAILED, happened
        )
        raise RunFailed(
            f"round {current.round_number} failed {self._parts.settings.max_attempts} times; "
            "see why with `python -m fedserver history --state-dir "
            f"{self._parts.settings.state_dir}`"
        )

    async def _latest(self) -> Round:
        latest = await self._parts.workers.in_store(
            self._parts.store.latest_round, self._parts.run.run_id
        )
        assert latest is not None
        return latest

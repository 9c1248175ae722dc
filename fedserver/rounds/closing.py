"""Where a round closes: COLLECTING -> AGGREGATING -> DONE, or FAILED.

    close:   no further update comes in
    finish:  screen -> aggregate -> checkpoint -> DONE and the next round, one transaction
    fail:    nothing of the attempt counts; the round is tried again

A round closes once `due_event` of fedserver.phases says so (asynchronous: `due_of_buffer`);
fedserver.rounds.collecting waits for that.

The server may be killed between any two steps: each rests on the phase that the store holds, and
repeated it has the same result.
"""

from collections.abc import Sequence

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.strategies.components import UnfitCohort
from fedrounds.types import IncidentKind, RunFailure
from fedserver.clients.open_orders import OpenOrders
from fedserver.events import event_of
from fedserver.housekeeping.retention import Retention
from fedserver.models.aggregation import reduce_updates
from fedserver.models.checkpoints import Checkpoints, GlobalModel, NonFiniteAggregate
from fedserver.models.client_metrics import client_evaluation_events, summarise_clients
from fedserver.models.evaluation import Evaluations
from fedserver.records import Adjustments, Attempt, Event, Exclusion, StoredUpdate
from fedserver.rounds.collecting import Collecting, verdict_text
from fedserver.rounds.deciding import decide_after
from fedserver.rounds.opening import Opener, opened_event
from fedserver.rounds.planning import stale_before, suspensions_after
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.screening import compared_rounds, screen
from fedserver.updates.spool import Spool


class Closer:
    """Closes, finishes and fails the attempts of one run."""

    def __init__(
        self,
        context: RunContext,
        *,
        collecting: Collecting,
        opener: Opener,
        evaluations: Evaluations,
        retention: Retention,
        open_orders: OpenOrders,
        store: AsyncStore,
        spool: Spool,
        checkpoints: Checkpoints,
        threads: Threads,
    ) -> None:
        self._context = context
        self._collecting = collecting
        self._opener = opener
        self._evaluations = evaluations
        self._retention = retention
        self._open_orders = open_orders
        self._store = store
        self._spool = spool
        self._checkpoints = checkpoints
        self._threads = threads
        # Orders that are carried over began with the model of an earlier round.
        self._is_base_shared = not collecting.carries_over

    async def close(self, collecting: Attempt) -> Attempt:
        """Close a round that collects: no further update comes in. Returns the closed attempt."""
        carries_over = self._collecting.carries_over
        failpoint(FailPoint.ROUND_CLOSING)
        # The store closes first: an update whose transaction comes before this transaction is in
        # the round, a later update is late (or carried over), whatever memory says meanwhile.
        await self._store.rounds.close_round(
            collecting, event_of("round-closed", collecting), carries_over=carries_over
        )
        failpoint(FailPoint.ROUND_CLOSED)
        self._collecting.note_closed()
        self._open_orders.close_round(carries_over=carries_over)
        return await latest_attempt(self._store, collecting.run_id)

    async def finish(self, closed: Attempt, base: GlobalModel) -> tuple[Attempt, GlobalModel]:
        """Make the next global model of a closed round, and open the round after it.

        Returns the round to go on with, and the model that it begins with: the round after; the
        same round if its base may be bad, or the run's last model; or the failed attempt.
        """
        # The next round must not rest on a model that turns out to be bad, or to be the last model.
        await self._evaluations.done()
        if self._evaluations.has_news:
            return closed, base
        stored = await self._store.orders.stored_updates(closed)
        exclusions = screen(
            closed,
            stored,
            before=await self._store.orders.counted_updates(
                closed.run_id, compared_rounds(closed.round_number, stored)
            ),
            settings=self._context.settings,
            model_norm=base.parameter_norm,
            trusted=await self._store.quarantine.trusted_clients(closed.run_id),
        )
        excluded = {exclusion.order_id for exclusion in exclusions}
        counted = [update for update in stored if update.update.order_id not in excluded]
        if len(counted) < self._collecting.updates_to_count(closed):
            failed = await self.fail(
                closed,
                _too_many_excluded(exclusions, num_stored=len(stored)),
                failure=RunFailure.TOO_MANY_EXCLUDED,
                exclusions=exclusions,
            )
            return failed, base
        try:
            # Durable when this returns; killed before the transaction below, the model is a file
            # that no round names, and is made again with the same bytes.
            model, bounded = await self._threads.on_disk(
                reduce_updates,
                self._context,
                closed,
                base,
                counted,
                spool=self._spool,
                checkpoints=self._checkpoints,
            )
        except (NonFiniteAggregate, UnfitCohort) as error:
            # Excluded they stay: the next attempt doesn't ask their clients.
            failed = await self.fail(
                closed,
                str(error),
                failure=RunFailure.NOT_AGGREGATED,
                exclusions=exclusions,
                is_model_bad=isinstance(error, NonFiniteAggregate),
            )
            return failed, base
        failpoint(FailPoint.MODEL_WRITTEN)
        following = await self._record(
            closed, model, counted=counted, exclusions=exclusions, bounded=bounded
        )
        failpoint(FailPoint.ROUND_DONE)
        await self._collecting.note_finished(counted, exclusions)
        if following is not None:
            # Clients train while the rest is done.
            await self._opener.publish(following, model)
        await self._retention.drop_updates(done_round=closed.round_number)
        await self._evaluations.start(closed, model.digest)
        await self._retention.drop_models(done_round=closed.round_number)
        return following or await latest_attempt(self._store, closed.run_id), model

    async def fail(
        self,
        failing: Attempt,
        reason: str,
        *,
        failure: RunFailure,
        exclusions: Sequence[Exclusion] = (),
        is_model_bad: bool = False,
    ) -> Attempt:
        """Fail an attempt, for a reason in words; returns the failed attempt.

        `failure` is the kind of reason; clients get it if the run fails. `is_model_bad` says that
        the aggregate isn't finite.
        """
        decision = await decide_after(
            self._context,
            failing,
            store=self._store,
            is_done=False,
            is_base_shared=self._is_base_shared,
            is_model_bad=is_model_bad,
        )
        failed = event_of(
            IncidentKind.ROUND_FAILED, failing, is_incident=True, reason=reason, failure=failure
        )
        await self._store.rounds.fail_round(
            failing,
            [failed, *decision.events],
            adjustments_after=decision.adjustments,
            exclusions=exclusions,
            is_base_blamed=decision.is_base_blamed,
        )
        failpoint(FailPoint.ROUND_FAILED)
        self._open_orders.abandon_round(failing)
        await self._collecting.note_failed()
        if decision.is_base_blamed:
            self._evaluations.suspect_model()
        await self._retention.drop_updates(done_round=failing.round_number - 1)
        return await latest_attempt(self._store, failing.run_id)

    async def _record(
        self,
        closed: Attempt,
        model: GlobalModel,
        *,
        counted: Sequence[StoredUpdate],
        exclusions: Sequence[Exclusion],
        bounded: Sequence[Event],
    ) -> Attempt | None:
        """Record a round as done, and the round after it in the same transaction.

        Returns the round after; None after the last round, or while there are too few clients or
        too little disk to open it.
        """
        settings = self._context.settings
        decision = await decide_after(
            self._context,
            closed,
            store=self._store,
            is_done=True,
            is_base_shared=self._is_base_shared,
        )
        following = None
        if closed.round_number < settings.rounds:
            following = await self._plan_next(
                closed, model, decision.adjustments, counted=counted, exclusions=exclusions
            )
        client_metrics = summarise_clients(
            [update.update for update in counted if not update.staleness],
            holdout=settings.holdout,
            metrics=self._context.metrics,
        )
        events = [
            *client_evaluation_events(closed, client_metrics),
            *bounded,
            event_of("round-done", closed, updates=len(counted), model=model.digest),
            *decision.events,
        ]
        if following is not None:
            events.append(opened_event(following))
        await self._store.rounds.finish_round(
            closed,
            model_digest=model.digest,
            state_digest=model.state_digest,
            adjustments_after=decision.adjustments,
            exclusions=exclusions,
            client_evaluation=client_metrics,
            next_round=following,
            stale_before=stale_before(settings, closed.round_number + 1),
            events=events,
        )
        return following

    async def _plan_next(
        self,
        closed: Attempt,
        model: GlobalModel,
        adjustments: Adjustments,
        *,
        counted: Sequence[StoredUpdate],
        exclusions: Sequence[Exclusion],
    ) -> Attempt | None:
        number = closed.round_number + 1
        # This round's exclusions aren't recorded yet, but they decide which clients the next round
        # asks.
        suspensions = suspensions_after(
            await self._store.quarantine.suspensions(closed.run_id),
            closed,
            exclusions,
            {update.client_id for update in counted},
        )
        num_attempts = len(await self._store.rounds.phases_of(closed.run_id, number))
        return await self._opener.plan(
            number,
            attempt=num_attempts + 1,
            base=model,
            adjustments=adjustments,
            suspensions=suspensions,
        )


async def latest_attempt(store: AsyncStore, run_id: str) -> Attempt:
    """Return the attempt with which a run that has begun goes on."""
    latest = await store.rounds.latest_attempt(run_id)
    assert latest is not None
    return latest


def _too_many_excluded(exclusions: Sequence[Exclusion], *, num_stored: int) -> str:
    """Return the reason for which a round fails that has too few updates left."""
    reason = f"{len(exclusions)} of {num_stored} updates were excluded, too many to go on"
    # A round closes with as many updates as it needs.
    assert exclusions
    first = min(exclusions, key=lambda exclusion: exclusion.client_id)
    clients = {exclusion.client_id for exclusion in exclusions}
    return f"{reason}; {verdict_text('excluded', clients, first.refusal.reason)}"

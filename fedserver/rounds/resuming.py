"""Where a run goes on: at its first round, or where it was when the server ended."""

from fedrounds.errors import StorageDamaged
from fedrounds.tasks.task import Task
from fedrounds.types import RunFailure
from fedserver.housekeeping.recovery import damaged_updates
from fedserver.housekeeping.retention import Retention
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.models.evaluation import Evaluations
from fedserver.models.first_model import first_model
from fedserver.phases import Phase
from fedserver.records import NO_ADJUSTMENTS, Attempt
from fedserver.rounds.closing import Closer
from fedserver.rounds.last_counted import LastCounted
from fedserver.rounds.opening import Opener
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool


async def resume(
    context: RunContext,
    task: Task,
    *,
    opener: Opener,
    closer: Closer,
    evaluations: Evaluations,
    retention: Retention,
    last_counted: LastCounted,
    store: AsyncStore,
    spool: Spool,
    quarantine: QuarantineFolder,
    checkpoints: Checkpoints,
    threads: Threads,
) -> tuple[Attempt, GlobalModel]:
    """Return the attempt with which the run goes on, and the model that it begins with.

    Opens the first round of a run that hasn't begun. Of an attempt that has ended DONE it is the
    model that it has made.

    Raises:
        StorageDamaged: that model, or an acknowledged update, isn't what was written.
    """
    latest = await store.rounds.latest_attempt(context.run_id)
    await last_counted.read()
    # Before anything new comes into the quarantine: what a kill left there has no record.
    await threads.on_disk(quarantine.tidy, await store.quarantine.held_updates())
    await retention.drop_updates(done_round=0 if latest is None else latest.round_number - 1)
    # A bad model that was recorded before the server ended may not have been taken back.
    evaluations.suspect_model()
    # Nor may it be known that the run stops early.
    evaluations.suspect_end()
    if latest is None:
        base = await first_model(
            task, context.settings, num_redraws=0, checkpoints=checkpoints, threads=threads
        )
        return await opener.open(1, base, NO_ADJUSTMENTS), base
    digest, state_digest = latest.base_digest, latest.base_state_digest
    if latest.phase is Phase.DONE:
        assert latest.model_digest is not None
        digest, state_digest = latest.model_digest, latest.state_digest
    base = await threads.on_disk(checkpoints.load, digest, state_digest=state_digest)
    if latest.phase in (Phase.COLLECTING, Phase.AGGREGATING):
        # They were acknowledged: no client sends them again, and aggregation would read them.
        damaged = await threads.on_disk(
            damaged_updates, spool, await store.orders.stored_updates(latest)
        )
        if damaged:
            latest = await _give_up_damaged(
                latest, damaged, closer=closer, is_allowed=context.settings.give_up_damaged
            )
    for done in await store.rounds.unevaluated_rounds(context.run_id):
        assert done.model_digest is not None
        await evaluations.start(done, done.model_digest)
    if latest.phase is Phase.COLLECTING:
        await opener.publish(latest, base)
    return latest, base


async def _give_up_damaged(
    latest: Attempt, damaged: list[str], *, closer: Closer, is_allowed: bool
) -> Attempt:
    """Fail the attempt whose updates are damaged, if --give-up-damaged allows it."""
    if not is_allowed:
        raise StorageDamaged(
            f"round {latest.round_number} can't go on: {'; '.join(damaged)}. Nothing was "
            "deleted: restore the files from a copy, or start with --give-up-damaged to ask "
            "the clients for this round anew; every finished round is whole"
        )
    return await closer.fail(
        latest,
        f"damaged on the disk: {'; '.join(damaged)}",
        failure=RunFailure.UPDATES_DAMAGED,
    )

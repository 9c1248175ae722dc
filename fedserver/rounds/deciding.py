"""Decides what changes after an attempt, from the diagnoses that its clients have reported.

The rules are in fedserver.rounds.adjustments; here they meet the store.
"""

from dataclasses import dataclass

from fedrounds.diagnosis.as_json import read_diagnosis
from fedrounds.diagnosis.values import Cause
from fedrounds.types import IncidentKind
from fedserver.events import event_of
from fedserver.models.evaluation import may_be_repeated
from fedserver.phases import Phase
from fedserver.records import Adjustments, Attempt, Event
from fedserver.rounds.adjustments import after_attempt, after_bad_model
from fedserver.run_context import RunContext
from fedserver.store import AsyncStore


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision after an attempt: the next attempt's adjustments, and the events to record.

    `is_base_blamed` says that its clients agree that the model they were sent is bad.
    """

    adjustments: Adjustments
    events: list[Event]
    is_base_blamed: bool = False


async def decide_after(
    context: RunContext,
    ending: Attempt,
    *,
    store: AsyncStore,
    is_done: bool,
    is_base_shared: bool,
    is_model_bad: bool = False,
) -> Decision:
    """Return the decision after an attempt, by the diagnoses that its clients have reported.

    `is_base_shared` says that all of its clients were sent the same model, `is_model_bad` that it
    failed because its aggregate isn't finite.
    """
    settings = context.settings
    diagnosed, updating = await store.events.answers(ending)
    reports = [(client_id, read_diagnosis(fields)) for client_id, fields in diagnosed]
    after, shared = after_attempt(
        ending.adjustments,
        reports,
        round_number=ending.round_number,
        is_done=is_done,
        num_answers=len(updating | {client_id for client_id, _ in reports}),
        max_steps=settings.max_adjustments,
    )
    before = await store.rounds.last_done_round(ending.run_id)
    phases = await store.rounds.phases_of(ending.run_id, ending.round_number)
    is_base_blamed = (
        not is_done
        and Cause.RECEIVED_MODEL in {shared_cause.cause for shared_cause in shared}
        and is_base_shared
        # One step back is all there is: older models may be gone.
        and Phase.ROLLED_BACK not in phases
        and before is not None
        and await may_be_repeated(before, store=store, max_rollbacks=settings.max_rollbacks)
    )
    events = [
        event_of(
            IncidentKind.CAUSE_SHARED,
            ending,
            is_incident=True,
            cause=str(shared_cause.cause),
            clients=list(shared_cause.clients),
            answers=shared_cause.num_answers,
            change=(
                "the model is taken back, its round repeated"
                if shared_cause.cause is Cause.RECEIVED_MODEL and is_base_blamed
                else shared_cause.change
            ),
        )
        for shared_cause in shared
    ]
    if is_model_bad:
        after = after_bad_model(after, max_steps=settings.max_adjustments)
    return Decision(adjustments=after, events=events, is_base_blamed=is_base_blamed)

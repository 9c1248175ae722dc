"""The report of one round for a person: when, who, what came of it, what went wrong."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedrounds.diagnosis.as_json import read_diagnosis
from fedrounds.diagnosis.text import is_cured
from fedrounds.times import iso_time
from fedrounds.types import IncidentKind, LeaveReason
from fedserver.clients.sampling import cohort_seed
from fedserver.history import AttemptHistory, OrderHistory, UpdateHistory
from fedserver.numbers import numbers_text
from fedserver.phases import OrderState, Phase
from fedserver.records import Event, Suspension
from fedserver.reporting.client_report import client_evaluation_text
from fedserver.reporting.diagnosis_report import (
    NUM_SHOWN_WHOLE,
    diagnosed_incidents,
    diagnosis_report,
)
from fedserver.reporting.tables import (
    Column,
    fact_table,
    fitting_table,
    number_text,
    phase_text,
    share_text,
)
from fedserver.rounds.adjustments import adjustment_text
from fedserver.settings import ServerSettings

_WORDS: Mapping[str, str] = {
    IncidentKind.NON_FINITE_LOSS: "training stopped: the loss wasn't finite",
    IncidentKind.NON_FINITE_GRADIENT: "training stopped: the gradient wasn't finite",
    IncidentKind.NON_FINITE_PARAMETER: "training stopped: a weight wasn't finite",
    IncidentKind.TRAINING_FAILED: "training failed",
    IncidentKind.TRAINING_DIAGNOSED: "training went wrong",
    IncidentKind.UPDATE_REFUSED: "its update was refused",
    IncidentKind.UPDATE_EXCLUDED: "its update was excluded",
    IncidentKind.BUFFER_BOUNDED: (
        "a buffer of its update lay far from the others' "
        "or held an impossible value, and was bounded"
    ),
    IncidentKind.UPDATE_LATE: "its update came too late",
    IncidentKind.UPDATE_CONTRADICTED: "it sent a second update for the same order",
    IncidentKind.ORDER_STALE: "its order was too stale to be waited for any longer",
    IncidentKind.CLIENT_STALLED: "it got no further and was given up",
    IncidentKind.CLIENT_LOST: "it wasn't there any more and was given up",
    IncidentKind.CLIENT_LEFT: "it left the run",
    IncidentKind.CLIENT_STATE_LOST: "it has lost its state",
    IncidentKind.STATE_DIR_COPIED: "two processes use copies of its state-dir; both were refused",
    IncidentKind.ROUND_FAILED: "the attempt failed",
    IncidentKind.SERVER_RESTARTED: "the server was started again",
    IncidentKind.SERVER_AWAY: "the server was stopped for a while and came back",
    IncidentKind.DISK_LOW: "the disk is nearly full: no round opens",
    IncidentKind.DISK_FULL: "the disk is full",
    IncidentKind.OUT_OF_FILES: "the server can't open another file",
    IncidentKind.SERVER_FAILED: "the server failed in a way that it doesn't foresee",
    IncidentKind.EVALUATION_COLLAPSED: "the new global model is bad",
    IncidentKind.MODEL_ROLLED_BACK: "the model was taken back; the one before it is in its place",
    IncidentKind.ROUND_ABANDONED: "the attempt was abandoned",
}
_LEAVE_REASONS: Mapping[str, str] = {
    LeaveReason.STOPPED: "somebody stopped its process",
    LeaveReason.GAVE_UP: "it can't do what the run asks for; its own log says why",
    LeaveReason.TASK_FAILED: "the task's own code failed; its own log says how",
}
_STOPS = {
    IncidentKind.NON_FINITE_LOSS,
    IncidentKind.NON_FINITE_GRADIENT,
    IncidentKind.NON_FINITE_PARAMETER,
    IncidentKind.TRAINING_FAILED,
    IncidentKind.TRAINING_DIAGNOSED,
    IncidentKind.CLIENT_STALLED,
    IncidentKind.CLIENT_LOST,
}
_VERDICTS = {IncidentKind.UPDATE_REFUSED, IncidentKind.UPDATE_EXCLUDED}
_ENDED_WITHOUT = (
    OrderState.REFUSED,
    OrderState.EXCLUDED,
    OrderState.LATE,
    OrderState.ABANDONED,
)
_NOT_NUMBERS = {"reason", "suspended_until", "first", "second", "failure"}
_DIGITS = 12
_PERSONAL_LEGEND = "personal: accuracy of what the client itself uses, after the round"
_LEGEND = (
    "base: the base model's accuracy on a client, before it trained; training: its own in the last "
    "epoch, while it trained"
)


def round_report(
    history: Sequence[AttemptHistory],
    round_number: int,
    *,
    latest_round: int,
    title: str,
    entry_digest: str | None,
    suspensions: Mapping[int, Suspension],
    run_settings: ServerSettings,
    max_width: int,
) -> Iterator[RenderableType]:
    """Yield a round's report for printing, in order; `history` holds it and the round before it.

    `latest_round` is the run's, `entry_digest` is of its entry in the ledger, `suspensions` are
    those of this moment.
    """
    attempts = [attempt for attempt in history if attempt.round_number == round_number]
    before = next(
        (
            attempt
            for attempt in history
            if attempt.round_number == round_number - 1 and attempt.is_done
        ),
        None,
    )
    yield Text(f"{title}: {phase_text(attempts[-1].phase)}", style="bold")
    for attempt in attempts:
        if len(attempts) > 1:
            yield _heading(f"Attempt {attempt.attempt}: {phase_text(attempt.phase)}")
        yield from _attempt_report(attempt, before, run_settings, max_width=max_width)
    suspended = [
        suspension
        for suspension in suspensions.values()
        if suspension.suspended_until > latest_round
    ]
    if suspended:
        yield _heading("Sitting out at this moment")
    for suspension in sorted(suspended, key=lambda suspension: suspension.client_id):
        why = _WORDS.get(suspension.reason, suspension.reason)
        yield Text(f"client {suspension.client_id} until round {suspension.suspended_until}: {why}")
    if entry_digest is not None:
        yield Text(f"\nIn the ledger with an entry of digest {entry_digest[:_DIGITS]}")


def _attempt_report(
    attempt: AttemptHistory,
    before: AttemptHistory | None,
    run_settings: ServerSettings,
    *,
    max_width: int,
) -> Iterator[RenderableType]:
    yield fact_table(
        [*_times(attempt), *_choice(attempt, run_settings), *_results(attempt, before)]
    )
    if changed := adjustment_text(attempt.adjustments):
        yield Text(f"changed for this attempt: {changed}")
    yield _heading(_turnout(attempt))
    yield _cohort_table(attempt, max_width=max_width)
    if any("global_accuracy" in update.metrics for update in attempt.updates):
        yield Text(_LEGEND, style="dim")
    if any("personal_accuracy" in update.metrics for update in attempt.updates):
        yield Text(_PERSONAL_LEGEND, style="dim")
    for line in _shortfalls(attempt):
        yield Text(line)
    if attempt.incidents:
        yield _heading("Incidents")
    for incident in attempt.incidents:
        text = incident_text(incident, is_beside_verdict=True)
        yield Text(f"{_second_text(incident.occurred_at)}  {text}")
    for incident in diagnosed_incidents(attempt)[:NUM_SHOWN_WHOLE]:
        yield from diagnosis_report(incident, max_width=max_width)


def incident_lines(history: Sequence[AttemptHistory]) -> list[str]:
    """Return a line for each incident of a run, in order: when, in which round, in words.

    Its kind, by which the documentation calls it, stands at the end.
    """
    return [
        f"{_second_text(incident.occurred_at)} round {attempt.round_number}: "
        f"{incident_text(incident)} [{incident.kind}]"
        for attempt in history
        for incident in attempt.incidents
    ]


def incident_text(incident: Event, *, is_beside_verdict: bool = False) -> str:
    """Return an incident in words: who, what, and the numbers that show it.

    Beside the verdict on an update, which gives the reason, it isn't given once more.
    """
    kind, fields = incident.kind, incident.fields
    who = "" if incident.client_id is None else f"client {incident.client_id}: "
    if kind == IncidentKind.CAUSE_SHARED:
        return _shared_text(incident)
    if kind == IncidentKind.CLIENT_LEFT and "clients" in fields:
        who = f"clients {numbers_text(fields['clients'])}"
        return f"{who} left the run: {_leave_text(fields['reason'])}"
    if "verdict" in fields:
        return f"{who}{fields['verdict']}"
    # The numbers of a verdict are in its reason.
    shown = {} if kind in _VERDICTS else fields
    numbers = ", ".join(
        _quantity_text(name, value)
        for name, value in shown.items()
        if name not in _NOT_NUMBERS and value is not None
    )
    gives_reason = not (is_beside_verdict and kind in _VERDICTS)
    reason = fields.get("reason") if gives_reason else None
    if reason is not None and kind == IncidentKind.CLIENT_LEFT:
        reason = _leave_text(reason)
    back_in = fields.get("suspended_until")
    return (
        f"{who}{_WORDS.get(kind, kind.replace('-', ' '))}"
        + (f": {reason}" if reason else "")
        + (f" ({numbers})" if numbers else "")
        + (f"; sits out until round {back_in}" if back_in else "")
    )


def _leave_text(reason: str) -> str:
    """Return in words why a client left: the reason it gave, or what the server concluded."""
    return _LEAVE_REASONS.get(reason, reason)


def _shared_text(incident: Event) -> str:
    fields = incident.fields
    clients = ", ".join(map(str, fields["clients"]))
    return (
        f"clients {clients} of {fields['answers']} that answered report {fields['cause']}: "
        f"{fields['change']}"
    )


def _times(attempt: AttemptHistory) -> list[tuple[str, str]]:
    times = [("opened", _second_text(attempt.started_at))]
    if attempt.closed_at is not None:
        closed = _second_text(attempt.closed_at) + _after_text(attempt.collected_s)
        times.append(("closed", closed))
    if attempt.finished_at is not None:
        word = "finished" if attempt.model_digest else "failed"
        since_close_s = (
            attempt.took_s
            if attempt.collected_s is None
            else _difference(attempt.took_s, attempt.collected_s)
        )
        times.append((word, _second_text(attempt.finished_at) + _after_text(since_close_s)))
    return times


def _choice(attempt: AttemptHistory, run_settings: ServerSettings) -> list[tuple[str, str]]:
    """Return the method by which the cohort was chosen, where not everybody was asked."""
    if not run_settings.clients_per_round:
        return []
    seed = cohort_seed(
        run_settings.seed, round_number=attempt.round_number, attempt=attempt.attempt
    )
    how = f"{len(attempt.cohort)} clients, {run_settings.cohort}, drawn with seed {seed}"
    return [("cohort", how)]


def _results(attempt: AttemptHistory, before: AttemptHistory | None) -> list[tuple[str, str]]:
    number = attempt.round_number
    of_round = f" (of round {number - 1})" if number > 1 else ""
    results = [("base model", attempt.base_digest[:_DIGITS] + of_round)]
    if attempt.model_digest:
        results.append(("model", attempt.model_digest[:_DIGITS]))
    numbers = attempt.evaluation.numbers if attempt.evaluation is not None else {}
    earlier_numbers = (
        before.evaluation.numbers if before is not None and before.evaluation is not None else {}
    )
    for name, value in numbers.items():
        if value is None:
            continue
        earlier = earlier_numbers.get(name)
        change = "" if earlier is None else f", {value - earlier:+.4f} on round {number - 1}"
        results.append((name.replace("_", " "), number_text(value) + change))
    if attempt.client_evaluation is not None:
        text = client_evaluation_text(attempt.client_evaluation)
        results.append(("base model on its clients", text))
    return results


def _turnout(attempt: AttemptHistory) -> str:
    num_good = sum(
        update.verdict in (OrderState.COUNTED, OrderState.STORED) for update in attempt.updates
    )
    word = "counted" if attempt.model_digest else "stored"
    if num_carried := attempt.num_carried_over:
        given = f"{len(attempt.cohort)} orders given, {num_carried} carried over"
        return f"{num_good} updates {word}; {given} from earlier rounds"
    return f"{num_good} of {len(attempt.cohort)} updates {word}"


def _cohort_table(attempt: AttemptHistory, *, max_width: int) -> Table:
    updates = {update.order_id: update for update in attempt.updates}
    given = {order.order_id for order in attempt.orders}
    carried = [update for update in attempt.updates if update.order_id not in given]
    rows: list[tuple[int, OrderState, UpdateHistory | None]] = [
        *((order.client_id, order.state, updates.get(order.order_id)) for order in attempt.orders),
        *((update.client_id, update.verdict, update) for update in carried),
    ]
    rows.sort(key=lambda row: row[0])
    received = [update for _, _, update in rows]
    metrics = [{} if update is None else update.metrics for update in received]
    columns = [
        Column("client", [str(client_id) for client_id, _, _ in rows]),
        Column("verdict", [state.lower() for _, state, _ in rows], "left"),
        Column(
            "examples",
            ["" if update is None else str(update.num_examples) for update in received],
        ),
    ]
    if carried:
        stale = ["" if update is None else str(update.staleness) for update in received]
        columns.insert(2, Column("stale", stale))
    if any("global_accuracy" in reported for reported in metrics):
        columns.append(Column("base", _metric_cells(metrics, "global_accuracy")))
    if any("personal_accuracy" in reported for reported in metrics):
        columns.append(Column("personal", _metric_cells(metrics, "personal_accuracy")))
    answered = [None if update is None else update.answered_s for update in received]
    if any("accuracy" in reported for reported in metrics):
        # While it trained, of the examples it trained on: no measure of a model.
        columns.append(Column("training", _metric_cells(metrics, "accuracy")))
    columns += [
        Column("loss", _metric_cells(metrics, "loss")),
        Column("answered", ["" if s is None else f"{s:.2f} s" for s in answered]),
        Column("took", _metric_cells(metrics, "train_s", "{:.2f} s")),
    ]
    if attempt.compression is not None:
        whole = attempt.base_bytes
        sent = [None if update is None else update.size_bytes / whole for update in received]
        lost = [reported.get("compression_error") for reported in metrics]
        columns += [
            Column("sent", [share_text(share) for share in sent]),
            Column("lost", [share_text(share) for share in lost]),
        ]
    return fitting_table(columns, title=None, max_width=max_width)


def _shortfalls(attempt: AttemptHistory) -> Iterator[str]:
    """Yield for each client whose update didn't count why it didn't."""
    updates = {update.order_id: update for update in attempt.updates}
    for order in attempt.orders:
        if order.state in _ENDED_WITHOUT:
            why = _why(attempt, order, updates.get(order.order_id))
            yield f"client {order.client_id} {order.state.lower()}: {why}"


def _why(attempt: AttemptHistory, order: OrderHistory, update: UpdateHistory | None) -> str:
    if update is not None and update.reason:
        return update.reason
    if attempt.is_done and (order.ended_at or 0.0) > (attempt.finished_at or 0.0):
        # Carried over; what went wrong stands in the round in which it did.
        ended_at = _second_text(order.ended_at or 0.0)
        return f"its order went on after the round and ended at {ended_at}"
    if order.state is OrderState.LATE:
        if update is None:
            return "nothing had come when the round closed"
        late_s = _difference(update.received_after_s, attempt.collected_s)
        return f"it came{'' if late_s is None else f' {late_s:.2f} s'} after the close"
    stops = [
        incident
        for incident in attempt.incidents
        if incident.client_id == order.client_id
        and incident.kind in _STOPS
        and not _has_gone_on(incident)
    ]
    if stops:
        return incident_text(replace(stops[-1], client_id=None))
    has_ended = attempt.phase in (Phase.FAILED, Phase.ABANDONED)
    return f"the attempt {phase_text(attempt.phase)}" if has_ended else "the client gave it up"


def _has_gone_on(incident: Event) -> bool:
    """Return whether the training went on past what the incident reports."""
    return "diagnosis" in incident.fields and is_cured(read_diagnosis(incident.fields))


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _second_text(at: float) -> str:
    return iso_time(at, timespec="seconds")


def _difference(end_s: float | None, begin_s: float | None) -> float | None:
    return None if end_s is None or begin_s is None else end_s - begin_s


def _after_text(seconds: float | None) -> str:
    return "" if seconds is None else f", after {seconds:.2f} s"


def _metric_cells(
    metrics: Sequence[Mapping[str, float | str]], name: str, shape: str = "{:.4f}"
) -> list[str]:
    """Return a metric of each client as text; a metric that isn't finite is its name."""
    values = [reported.get(name) for reported in metrics]
    return [
        shape.format(value) if isinstance(value, float) else str(value or "") for value in values
    ]


def _quantity_text(name: str, value: object) -> str:
    """Return a number with its name, and the unit that the name ends with behind it."""
    *words, unit = name.split("_")
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    if words and unit in ("s", "bytes"):
        return f"{' '.join(words)} {shown} {unit}"
    return f"{name.replace('_', ' ')} {shown}"

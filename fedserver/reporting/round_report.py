"""One round told as a person would: when, who, what came of it, what went wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedrounds.times import to_the_second
from fedrounds.types import IncidentKind, LeaveReason
from fedserver.clients.sampling import cohort_seed
from fedserver.models.client_metrics import spread_text
from fedserver.numbers import numbers_text
from fedserver.records import Adjustments, Suspension
from fedserver.reporting.diagnosis_report import NUM_SHOWN_WHOLE, diagnosed, diagnosis_account
from fedserver.reporting.tables import (
    Column,
    History,
    fact_table,
    fitting_table,
    number_text,
    phase_text,
    share_text,
)
from fedserver.rounds.adjustments import adjustment_text

Values = Mapping[str, Any]

_WORDS: Mapping[str, str] = {
    IncidentKind.NON_FINITE_LOSS: "training stopped: the loss wasn't finite",
    IncidentKind.NON_FINITE_GRADIENT: "training stopped: the gradient wasn't finite",
    IncidentKind.NON_FINITE_PARAMETER: "training stopped: a weight wasn't finite",
    IncidentKind.TRAINING_FAILED: "training failed",
    IncidentKind.TRAINING_DIAGNOSED: "training went wrong",
    IncidentKind.UPDATE_REFUSED: "its update was refused",
    IncidentKind.UPDATE_EXCLUDED: "its update was excluded",
    IncidentKind.BUFFER_BOUNDED: "a buffer of its update lay far from the others' and was bounded",
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
_ENDED_WITHOUT = ("REFUSED", "EXCLUDED", "LATE", "ABANDONED")
_DIGITS = 12
_PERSONAL_LEGEND = "personal: accuracy of what the client itself uses, after the round"
_LEGEND = (
    "base: the base model's accuracy on a client, before it trained; training: its own in the last "
    "epoch, while it trained"
)


def round_account(
    history: History,
    round_number: int,
    *,
    latest_round: int,
    title: str,
    entry_digest: str | None,
    suspensions: Mapping[int, Suspension],
    run_settings: Mapping[str, Any],
    max_width: int,
) -> Iterator[RenderableType]:
    """Yield what to print of a round, in order; of the run's `history` that one and the one before.

    `latest_round` is the run's, `entry_digest` is of its entry in the ledger, `suspensions` are
    those of this moment.
    """
    attempts = [one for one in history if one["round"] == round_number]
    before = [one for one in history if one["round"] == round_number - 1 and one["phase"] == "DONE"]
    yield Text(f"{title}: {phase_text(attempts[-1])}", style="bold")
    for attempt in attempts:
        if len(attempts) > 1:
            yield _heading(f"Attempt {attempt['attempt']}: {phase_text(attempt)}")
        yield fact_table(
            [*_times(attempt), *_choice(attempt, run_settings), *_results(attempt, before)]
        )
        if changed := adjustment_text(Adjustments(**attempt["adjustments"])):
            yield Text(f"changed for this attempt: {changed}")
        yield _heading(_turnout(attempt))
        yield _cohort_table(attempt, max_width=max_width)
        if attempt["client_evaluation"]:
            yield Text(_LEGEND, style="dim")
        if any("personal_accuracy" in one["metrics"] for one in attempt["updates"]):
            yield Text(_PERSONAL_LEGEND, style="dim")
        for line in _shortfalls(attempt):
            yield Text(line)
        if attempt["incidents"]:
            yield _heading("Incidents")
        for incident in attempt["incidents"]:
            text = incident_text(incident, is_beside_verdict=True)
            yield Text(f"{to_the_second(incident['at'])}  {text}")
        for incident in diagnosed(attempt)[:NUM_SHOWN_WHOLE]:
            yield from diagnosis_account(incident, max_width=max_width)
    suspended = [one for one in suspensions.values() if one.suspended_until > latest_round]
    if suspended:
        yield _heading("Sitting out at this moment")
    for one in sorted(suspended, key=lambda one: one.client_id):
        why = _WORDS.get(one.reason, one.reason)
        yield Text(f"client {one.client_id} until round {one.suspended_until}: {why}")
    if entry_digest is not None:
        yield Text(f"\nIn the ledger with an entry of digest {entry_digest[:_DIGITS]}")


def incident_lines(history: History) -> list[str]:
    """Return a line for each incident of a run, in order: when, in which round, in words.

    Its kind, by which the documentation calls it, stands at the end.
    """
    return [
        f"{to_the_second(incident['at'])} round {entry['round']}: {incident_text(incident)} "
        f"[{incident['kind']}]"
        for entry in history
        for incident in entry["incidents"]
    ]


def incident_text(incident: Values, *, is_beside_verdict: bool = False) -> str:
    """Return an incident in words: who, what, and the numbers that show it.

    Beside the verdict on an update, which tells why, an incident doesn't tell it once more.
    """
    kind = incident["kind"]
    who = "" if incident["client"] is None else f"client {incident['client']}: "
    if kind == IncidentKind.CAUSE_SHARED:
        return _shared_text(incident)
    if kind == IncidentKind.CLIENT_LEFT and "clients" in incident:
        who = f"clients {numbers_text(incident['clients'])}"
        return f"{who} left the run: {_leave_text(incident['reason'])}"
    if "verdict" in incident:
        return f"{who}{incident['verdict']}"
    known = {"kind", "at", "client", "reason", "suspended_until", "first", "second", "failure"}
    # The numbers of a verdict are in its reason.
    left_out = set(incident) if kind in _VERDICTS else known
    numbers = ", ".join(
        _quantity_text(key, value)
        for key, value in incident.items()
        if key not in left_out and value is not None
    )
    tells_reason = not (is_beside_verdict and kind in _VERDICTS)
    reason = incident.get("reason") if tells_reason else None
    if reason is not None and kind == IncidentKind.CLIENT_LEFT:
        reason = _leave_text(reason)
    back_in = incident.get("suspended_until")
    return (
        f"{who}{_WORDS.get(kind, kind.replace('-', ' '))}"
        + (f": {reason}" if reason else "")
        + (f" ({numbers})" if numbers else "")
        + (f"; sits out until round {back_in}" if back_in else "")
    )


def _leave_text(reason: str) -> str:
    """Return in words why a client left: what it said, or what the server concluded."""
    return _LEAVE_REASONS.get(reason, reason)


def _shared_text(incident: Values) -> str:
    clients = ", ".join(map(str, incident["clients"]))
    return (
        f"clients {clients} of {incident['answers']} that answered report {incident['cause']}: "
        f"{incident['change']}"
    )


def _times(attempt: Values) -> list[tuple[str, str]]:
    opened, closed, finished = (attempt[f"{one}_at"] for one in ("started", "closed", "finished"))
    collected_s, took_s = attempt["collected_s"], attempt["took_s"]
    times = [("opened", to_the_second(opened))]
    if closed:
        times.append(("closed", to_the_second(closed) + _after_text(collected_s)))
    if finished:
        word = "finished" if attempt["model_digest"] else "failed"
        since_close_s = took_s if collected_s is None else _difference(took_s, collected_s)
        times.append((word, to_the_second(finished) + _after_text(since_close_s)))
    return times


def _choice(attempt: Values, run_settings: Values) -> list[tuple[str, str]]:
    """Return how the cohort was chosen, where not everybody was asked."""
    if not run_settings.get("clients_per_round"):
        return []
    seed = cohort_seed(
        run_settings["seed"], round_number=attempt["round"], attempt=attempt["attempt"]
    )
    how = f"{len(attempt['cohort'])} clients, {run_settings['cohort']}, drawn with seed {seed}"
    return [("cohort", how)]


def _results(attempt: Values, before: History) -> list[tuple[str, str]]:
    of_round = f" (of round {attempt['round'] - 1})" if attempt["round"] > 1 else ""
    results = [("base model", attempt["base_digest"][:_DIGITS] + of_round)]
    if attempt["model_digest"]:
        results.append(("model", attempt["model_digest"][:_DIGITS]))
    earlier = (before[0]["evaluation"] if before else None) or {}
    for name, value in (attempt["evaluation"] or {}).items():
        if not isinstance(value, float):
            continue
        change = ""
        if isinstance(earlier.get(name), float):
            change = f", {value - earlier[name]:+.4f} on round {attempt['round'] - 1}"
        results.append((name.replace("_", " "), number_text(value) + change))
    if said := attempt["client_evaluation"]:
        results.append(("base model on its clients", spread_text(said)))
    return results


def _turnout(attempt: Values) -> str:
    num_good = sum(one["verdict"] in ("COUNTED", "STORED") for one in attempt["updates"])
    word = "counted" if attempt["model_digest"] else "stored"
    if num_carried := attempt["carried_over"]:
        given = f"{len(attempt['cohort'])} orders given, {num_carried} carried over"
        return f"{num_good} updates {word}; {given} from earlier rounds"
    return f"{num_good} of {len(attempt['cohort'])} updates {word}"


def _cohort_table(attempt: Values, *, max_width: int) -> Table:
    updates = {one["order_id"]: one for one in attempt["updates"]}
    given = {one["order_id"] for one in attempt["orders"]}
    carried = [
        {**one, "state": one["verdict"]}
        for one in attempt["updates"]
        if one["order_id"] not in given
    ]
    orders = sorted([*attempt["orders"], *carried], key=lambda one: int(one["client"]))
    found = [updates.get(one["order_id"], {}) for one in orders]
    metrics = [one.get("metrics", {}) for one in found]
    columns = [
        Column("client", [str(one["client"]) for one in orders]),
        Column("verdict", [one["state"].lower() for one in orders], "left"),
        Column("examples", [str(one.get("num_examples", "")) for one in found]),
    ]
    if any("global_accuracy" in one for one in metrics):
        before = [_metric_text(one.get("global_accuracy")) for one in metrics]
        columns.append(Column("base", before))
    if any("personal_accuracy" in one for one in metrics):
        own = [_metric_text(one.get("personal_accuracy")) for one in metrics]
        columns.append(Column("personal", own))
    columns += [
        # While it trained, of the examples it trained on: no measure of a model.
        Column("training", [_metric_text(one.get("accuracy")) for one in metrics]),
        Column("loss", [_metric_text(one.get("loss")) for one in metrics]),
        Column(
            "answered",
            [
                "" if one.get("answered_s") is None else f"{one['answered_s']:.2f} s"
                for one in found
            ],
        ),
        Column(
            "took",
            [_metric_text(one.get("train_s"), "{:.2f} s") for one in metrics],
        ),
    ]
    if carried:
        stale = [str(one.get("staleness", "")) for one in found]
        columns.insert(2, Column("stale", stale))
    if attempt["compression"]:
        whole = attempt["base_bytes"]
        sent = [one["size_bytes"] / whole if one else None for one in found]
        lost = [one.get("compression_error") for one in metrics]
        columns += [
            Column("sent", [share_text(one) for one in sent]),
            Column("lost", [share_text(one) for one in lost]),
        ]
    return fitting_table(columns, title=None, max_width=max_width)


def _shortfalls(attempt: Values) -> Iterator[str]:
    """Yield for each client whose update didn't count why it didn't."""
    updates = {one["order_id"]: one for one in attempt["updates"]}
    for order in attempt["orders"]:
        if order["state"] in _ENDED_WITHOUT:
            client = order["client"]
            why = _why(attempt, order, updates.get(order["order_id"]))
            yield f"client {client} {order['state'].lower()}: {why}"


def _why(attempt: Values, order: Values, update: Values | None) -> str:
    state, client = order["state"], order["client"]
    if update is not None and update["reason"]:
        return str(update["reason"])
    if attempt["phase"] == "DONE" and order["ended_at"] > attempt["finished_at"]:
        # Carried over; what went wrong is told of the round in which it did.
        ended_at = to_the_second(order["ended_at"])
        return f"its order went on after the round and ended at {ended_at}"
    if state == "LATE":
        if update is None:
            return "nothing had come when the round closed"
        late_s = _difference(update["received_after_s"], attempt["collected_s"])
        return f"it came{'' if late_s is None else f' {late_s:.2f} s'} after the close"
    stops = [
        one
        for one in attempt["incidents"]
        if one["client"] == client and one["kind"] in _STOPS and not _is_cured(one)
    ]
    if stops:
        return incident_text({**stops[-1], "client": None})
    ended = attempt["phase"] in ("FAILED", "ABANDONED")
    return f"the attempt {phase_text(attempt)}" if ended else "the client gave it up"


def _is_cured(incident: Values) -> bool:
    return "diagnosis" in incident and bool(incident["diagnosis"]["remedy"]["is_working"])


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _difference(end_s: float | None, begin_s: float | None) -> float | None:
    return None if end_s is None or begin_s is None else end_s - begin_s


def _after_text(seconds: float | None) -> str:
    return "" if seconds is None else f", after {seconds:.2f} s"


def _metric_text(value: object, shape: str = "{:.4f}") -> str:
    # A number that isn't finite is kept by its name.
    return shape.format(value) if isinstance(value, float) else str(value or "")


def _quantity_text(name: str, value: object) -> str:
    """Return a number with its name, and the unit that the name ends with behind it."""
    *words, unit = name.split("_")
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    if words and unit in ("s", "bytes"):
        return f"{' '.join(words)} {shown} {unit}"
    return f"{name.replace('_', ' ')} {shown}"

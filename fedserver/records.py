"""The values the coordinator works with and the store keeps. Times are seconds since the epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fedrounds.types import ClientUpdate
from fedserver.ledger import LedgerUpdate
from fedserver.phases import OrderEvent, OrderState, Phase


def json_number(value: float) -> float | str:
    """Return a number as JSON can hold it: a name instead of a NaN or an infinity."""
    return value if abs(value) < float("inf") else str(value)


class HeldState(StrEnum):
    """The state of an update in quarantine; the bytes are kept only while it is HELD."""

    HELD = "HELD"
    RELEASED = "RELEASED"
    DROPPED = "DROPPED"
    EVICTED = "EVICTED"


class RunState(StrEnum):
    """Where a run stands."""

    OPEN = "OPEN"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A sequence of rounds under one set of settings."""

    run_id: str
    number: int
    settings: Mapping[str, Any]
    state: RunState


@dataclass(frozen=True, kw_only=True)
class Session:
    """A client process and the ids that it serves.

    `num_examples` is empty until the process has registered with the sizes of its data.

    `processes` are the keys of the processes that had the session in turn, the last one has it; the
    store doesn't keep them. Empty: nobody has registered since the server started, or a client
    without such a key.
    """

    session_id: str
    instance_key: str
    client_ids: tuple[int, ...]
    num_examples: tuple[int, ...]
    software_version: str
    processes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Order:
    """One piece of work for one client in one attempt at a round.

    `num_examples` is how many examples the client had registered when it got the order: what it
    registers later doesn't change it. None: the order was given by a version that didn't record it.
    """

    order_id: str
    client_id: int
    num_examples: int | None = None
    state: OrderState = OrderState.OPEN

    @property
    def sequence(self) -> int:
        """This order's number among the client's orders in the attempt, from 1."""
        return int(self.order_id.rpartition("-s")[2])


@dataclass(frozen=True, kw_only=True)
class OrderRecord:
    """What the store knows of an order; `digest` and `reason` are of the update it ended with."""

    order_id: str
    run_id: str
    round_number: int
    attempt: int
    client_id: int
    state: OrderState
    digest: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """The changes of the settings for one attempt at a round, because of earlier attempts.

    `lr_factor` multiplies the clients' rate, `norm_band_factor` the width of the norm band,
    `clip_norm` bounds the L2 norm of their gradients beside the setting's. `num_lowered` counts
    the steps that the rate was lowered by and `num_clipped` those of the clipping, `num_doublings`
    how often its norm was doubled since; `num_redraws` how often the first model was drawn anew.
    """

    lr_factor: float = 1.0
    num_lowered: int = 0
    clip_norm: float | None = None
    num_clipped: int = 0
    num_doublings: int = 0
    norm_band_factor: float = 1.0
    num_redraws: int = 0

    def as_json(self) -> dict[str, float | int]:
        """Return the fields that differ from those of no adjustment."""
        nothing = asdict(NO_ADJUSTMENTS)
        return {name: value for name, value in asdict(self).items() if value != nothing[name]}


NO_ADJUSTMENTS = Adjustments()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt at a round; `max_delta_norm` is the norm cap frozen when it opened.

    `base_bytes` is the size of the base model. `base_state_digest` and `state_digest` are the
    server state before and after, None where there is none. `adjustments` were in force in it, its
    end has led to `adjustments_after`.
    """

    run_id: str
    round_number: int
    attempt: int
    phase: Phase
    base_digest: str
    base_bytes: int
    max_delta_norm: float
    orders: tuple[Order, ...]
    base_state_digest: str | None = None
    model_digest: str | None = None
    state_digest: str | None = None
    adjustments: Adjustments = NO_ADJUSTMENTS
    adjustments_after: Adjustments = NO_ADJUSTMENTS

    @property
    def cohort(self) -> tuple[int, ...]:
        """The client ids chosen, ascending."""
        return tuple(order.client_id for order in self.orders)


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """How good a global model is on the task's held-out set; numbers that aren't finite are None.

    `metrics` are the task's own. `class_accuracy` is each class's accuracy (None: no example of
    it), `confusion` [class, answer] counts answers, the last column those that name no class; None
    where the task doesn't say how many classes it has, or they are too many.
    """

    accuracy: float | None
    loss: float | None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    class_accuracy: Sequence[float | None] | None = None
    confusion: Sequence[Sequence[int]] | None = None

    @property
    def numbers(self) -> dict[str, float | None]:
        """Accuracy, loss and the task's metrics by name."""
        return {"accuracy": self.accuracy, "loss": self.loss, **self.metrics}

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that the store keeps and the history shows."""
        by_class = {"class_accuracy": self.class_accuracy, "confusion": self.confusion}
        return self.numbers | {name: value for name, value in by_class.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation:
    """How good a global model is on its clients, as they report it.

    `accuracy` and `loss` are means weighted by the examples measured on (accuracy is None where
    targets aren't classes, loss unless every client reports a loss). The other numbers are of the
    clients' accuracies, or of their losses where there is no accuracy (`spread_of`), and each
    client counts the same: `worst_decile` is the mean of the worst tenth, at least one client;
    `std` is the standard deviation of exactly these clients; the quartiles lie between two clients
    linearly. `num_clients` and `num_examples` count
    those measured. `holdout` is the share of its examples that a client never trains on and was
    asked about; 0: it was asked about those it trains on. `metrics` are the task's own, None where
    they can't be computed: over the examples of all clients together, but those named in
    `means_over_clients` are the mean of the clients' values.
    """

    accuracy: float | None = None
    mean: float
    worst_decile: float
    std: float
    minimum: float
    quartile_1: float
    median: float
    quartile_3: float
    maximum: float
    num_clients: float
    num_examples: float
    holdout: float
    loss: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    means_over_clients: tuple[str, ...] = ()

    @property
    def spread_of(self) -> str:
        """The number of which mean, worst tenth, deviation and quartiles are given."""
        return "loss" if self.accuracy is None else "accuracy"

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that the store keeps and the history shows."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, ())}


@dataclass(frozen=True, kw_only=True)
class StoredUpdate:
    """An update the round rests on; `delta_norm` is the L2 norm of local minus global.

    `num_registered` is how many examples its client had registered when it got the order (see
    Order). `own_base` is the digest of the model it began with where that isn't the round's,
    `staleness` how many rounds earlier its order was given.
    """

    client_id: int
    update: ClientUpdate
    delta_norm: float
    num_registered: int | None = None
    own_base: str | None = None
    staleness: int = 0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why an update is kept out of the global model; `evidence` holds JSON values only."""

    reason: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An update that has come in, and the event that it is for its order: STORE, REFUSE or MISS.

    `refusal` belongs to REFUSE, and `delta_norm` (the L2 norm of local minus global) to STORE.
    `kept_bytes` is how much of its payload has arrived. `handed_out_at` is the time at which its
    order was first pulled, `answered_s` how many seconds later it came; None where it isn't known.
    """

    update: ClientUpdate
    order_event: OrderEvent
    refusal: Refusal | None = None
    delta_norm: float | None = None
    kept_bytes: int = 0
    handed_out_at: float | None = None
    answered_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A stored update that its round is screened of, what is kept of it, and what to record."""

    order_id: str
    client_id: int
    refusal: Refusal
    kept_bytes: int
    event: "Event"


@dataclass(frozen=True, kw_only=True)
class HeldUpdate:
    """An update in quarantine.

    `verdict` is how its order ended, `kept_bytes` what is kept of its payload (0: it was refused
    before any byte was taken).
    """

    order_id: str
    digest: str
    run_id: str
    client_id: int
    round_number: int
    verdict: OrderState
    state: HeldState
    refusal: Refusal
    kept_bytes: int
    held_at: float


@dataclass(frozen=True, kw_only=True)
class Suspension:
    """A client that sits out some rounds; clients without a suspension are active.

    It takes part again from round `suspended_until` on. `strikes` counts the client's strikes since
    an update of its last counted.
    """

    client_id: int
    strikes: int
    suspended_until: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Participation:
    """What a client has done in a run so far.

    `num_asked` counts its orders, `num_answered` those it has sent an admitted update for. `loss`
    is the last loss that it reported: of the global model on its data, if it is asked for that,
    else of its last local epoch; None before the first.
    """

    num_asked: int = 0
    num_answered: int = 0
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a run; an incident is an event of something that went wrong.

    `occurred_at` is in seconds since 1970 (UTC). `fields` holds what belongs to the kind, only
    JSON values.
    """

    kind: str
    occurred_at: float
    round_number: int | None = None
    attempt: int | None = None
    client_id: int | None = None
    is_incident: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """A ledger's entry (canonical JSON, see fedserver.ledger) as the store holds it.

    `kind` is the RoundEvent that it records: "finish" or "roll-back".
    """

    round_number: int
    attempt: int
    kind: str
    entry: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """An attempt at a round as its rows are, unconverted; `updates` as an entry holds them."""

    round_number: int
    attempt: int
    phase: str
    base_digest: str
    base_state_digest: str | None
    model_digest: str | None
    state_digest: str | None
    adjustments: Mapping[str, Any]
    updates: Sequence[LedgerUpdate]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A run's ledger and the rows beside it, as of one moment.

    `head` is the digest of the last entry, as the run has it; None before the first.
    """

    run_id: str
    settings: Mapping[str, Any]
    head: str | None
    entries: Sequence[LedgerRow]
    attempts: Sequence[AttemptRow]

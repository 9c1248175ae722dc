"""The values that both sides share: frozen, and independent of wire and database."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from fedrounds.diagnosis.values import Diagnosis

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "step", "cosine"]
AugmentationName = Literal["none", "shift"]
InitialisationName = Literal[
    "default",
    "kaiming_uniform",
    "kaiming_normal",
    "xavier_uniform",
    "xavier_normal",
    "orthogonal",
]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the step size changes over `total_epochs` epochs (0: this training's own).

    This training begins at epoch `first_epoch` of them, from 0. Over the first `warmup_epochs` the
    step size grows linearly from nearly 0 to lr. After them it stays constant ("constant"), is
    multiplied by `decay` every `decay_epochs` epochs, counted from the first epoch ("step"), or
    falls to 0 along half a cosine ("cosine").
    """

    name: str = "constant"
    warmup_epochs: float = 0.0
    decay_epochs: int = 10
    decay: float = 0.1
    first_epoch: int = 0
    total_epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class ClientAlgorithmConfig:
    """The client algorithm that an order asks for, by name, with its numbers."""

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)


EVALUATION_BATCH_SIZE = 256
"""Examples that a client evaluates at a time, whatever the batches are that it trains on."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a client trains in one round; sent with every order.

    `lr` is the step size, `clip_norm` the largest global L2 norm of a gradient (None: no clipping),
    `augmentation` the random change of each batch's inputs. With a `work_deadline_s` training ends
    after the first step beyond that many seconds; the update is what was learned by then.
    """

    epochs: int = 2
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: str = "none"
    client_algorithm: ClientAlgorithmConfig | None = None
    work_deadline_s: float | None = None


class IncidentKind(StrEnum):
    """What can go wrong in a run; the values are the names in the history."""

    NON_FINITE_LOSS = "non-finite-loss"
    NON_FINITE_GRADIENT = "non-finite-gradient"
    NON_FINITE_PARAMETER = "non-finite-parameter"
    TRAINING_FAILED = "training-failed"
    TRAINING_DIAGNOSED = "training-diagnosed"
    """Training went wrong; the diagnosis says why, and whether the doctor cured it."""
    UPDATE_REFUSED = "update-refused"
    UPDATE_CONTRADICTED = "update-contradicted"
    UPDATE_EXCLUDED = "update-excluded"
    BUFFER_BOUNDED = "buffer-bounded"
    """An update counts, but a buffer of it was bounded, since it was far from its cohort's."""
    UPDATE_LATE = "update-late"
    ORDER_STALE = "order-stale"
    """More rounds have finished without its update than an asynchronous run waits for."""
    CLIENT_STALLED = "client-stalled"
    CLIENT_LOST = "client-lost"
    CLIENT_LEFT = "client-left"
    CLIENT_STATE_LOST = "client-state-lost"
    STATE_DIR_COPIED = "state-dir-copied"
    """Two processes use copies of one client's state-dir at the same time; both are refused."""
    ROUND_FAILED = "round-failed"
    SERVER_RESTARTED = "server-restarted"
    SERVER_AWAY = "server-away"
    """The server was stopped or starved and came back; no client's time ran meanwhile."""
    DISK_LOW = "disk-low"
    DISK_FULL = "disk-full"
    OUT_OF_FILES = "out-of-files"
    """The server can't open another file."""
    SERVER_FAILED = "server-failed"
    """A call or a step of the round loop failed in an unexpected way."""
    EVALUATION_COLLAPSED = "evaluation-collapsed"
    """The new global model is bad: by its loss, or because it predicts one class only."""
    MODEL_ROLLED_BACK = "model-rolled-back"
    ROUND_ABANDONED = "round-abandoned"
    CAUSE_SHARED = "cause-shared"
    """Several clients report the same cause in a round."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that went wrong, with the numbers that show it.

    `step` counts optimizer steps of the order from 1; `tensor` is a declared entry of the
    model's state_dict; `detail` holds numbers only, so that no private text can travel in it. A
    `diagnosis` belongs to TRAINING_DIAGNOSED and to nothing else.
    """

    kind: IncidentKind
    step: int | None = None
    epoch: int | None = None
    tensor: str | None = None
    detail: Mapping[str, float] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None


class Encoding(StrEnum):
    """How an update is encoded.

    STATE_DICT is the whole trained state_dict. The others are the compressed delta: see
    fedrounds.tensors.compression.
    """

    STATE_DICT = "state-dict"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    TOP_K = "top-k"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How updates are compressed; STATE_DICT: not at all.

    `block_size` is the number of values that share a scale under INT8, `fraction` the share of
    coordinates that TOP_K sends.
    """

    encoding: Encoding = Encoding.STATE_DICT
    block_size: int = 256
    fraction: float = 0.05


NO_COMPRESSION = Compression()

MAX_INT32 = 2**31 - 1
MAX_UINT64 = 2**64 - 1
MAX_DURATION_S = 315_576_000_000
"""The most that a number or a duration of the protocol can be; 10,000 years of seconds."""

MAX_CLIENT_ID = 2**53
MAX_CLIENT_IDS = 10_000
"""The largest number of client ids in one process, and so in one session."""

MODEL_SECTION = "model"
"""The payload section that holds a whole state_dict."""

CONTROL_SECTION = "control"
"""SCAFFOLD's control variates.

To a client: the server's, of each parameter's shape with a last dimension of 1 (absent: all are 0).
From a client: the changes of its own."""


class EntryKind(StrEnum):
    """How an entry of a state_dict is aggregated.

    PARAMETER is aggregated by the strategy, and a server optimizer moves it. MEAN is averaged. MAX
    is the elementwise maximum of the global model and the updates. KEEP stays as it is in the
    global model. LOCAL belongs to each client: it is never sent, and the global model keeps its
    first value.
    """

    PARAMETER = "parameter"
    MEAN = "mean"
    MAX = "max"
    KEEP = "keep"
    LOCAL = "local"

    @property
    def is_constant(self) -> bool:
        """Whether the entry's value in the global model never changes."""
        return self in (EntryKind.KEEP, EntryKind.LOCAL)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A named part of a payload: one safetensors file of `size_bytes` bytes."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Partitioning:
    """How a simulation partitions one data set over `num_partitions` clients."""

    scheme: str
    num_partitions: int
    seed: int
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a client reports about itself; `num_examples` is empty until it has read its data.

    `capabilities` are the encodings that it can send beside the whole state_dict. `process_key` is
    a random text of this process; empty if the client sends no key.
    """

    client_ids: tuple[int, ...]
    instance_key: str
    software_version: str
    task: str = ""
    num_examples: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()
    process_key: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """The server's answer to a registration; durations in seconds.

    `entry_kinds` say how each entry of the model's state_dict is aggregated; empty: the server
    doesn't say.
    """

    session_id: str
    run_id: str
    task: str
    partitioning: Partitioning
    max_wait_s: float
    lease_s: float
    total_rounds: int
    compression: Compression = NO_COMPRESSION
    entry_kinds: Mapping[str, EntryKind] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorkOrder:
    """One piece of work for one client; ends exactly once.

    With `evaluate` the client also reports how good the global model is on its own examples: on the
    share `holdout` of them that it never trains on, or on all of them if that is 0.
    """

    order_id: str
    client_id: int
    round_number: int
    attempt: int
    sections: tuple[Section, ...]
    training: TrainingConfig
    seed: int
    last_counted_order_id: str = ""
    evaluate: bool = False
    holdout: float = 0.0


class WorkState(StrEnum):
    """The kinds of answers to a pull for work."""

    ORDER = "order"
    WAIT = "wait"
    FINISHED = "finished"


class RunFailure(StrEnum):
    """Why the last attempt at the round that ended a run failed."""

    TOO_FEW_UPDATES = "too-few-updates"
    TOO_MANY_EXCLUDED = "too-many-excluded"
    NOT_AGGREGATED = "not-aggregated"
    UPDATES_DAMAGED = "updates-damaged"
    UPDATES_REFUSED = "updates-refused"


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended; `failure` is the reason, if `has_failed` and the server gives it."""

    has_failed: bool
    failure: RunFailure | None = None


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why there is no order yet.

    `round_number` is the round that collects updates, from 1. If too few clients are present to
    open the next round, `clients_here` is their number and `clients_needed` the number required.
    Fields that don't apply are 0.
    """

    round_number: int = 0
    clients_here: int = 0
    clients_needed: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """The answer to a pull for work.

    `order` is set if `state` is ORDER, `run_end` if it is FINISHED, and `waiting` if it is WAIT and
    the server gives the reason.
    """

    state: WorkState
    order: WorkOrder | None = None
    run_end: RunEnd | None = None
    waiting: Waiting | None = None


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """A client's description of the payload that it sends for an order.

    `num_examples` is the update's weight in the mean, `num_steps` its number of optimizer steps.
    The payload is the concatenation of the sections, and `digest` the digest of the payload.
    `measurements` are what the client reports of the task's metrics of the global model, by the
    names of `fedrounds.training.metrics.measurement_sizes`.
    """

    order_id: str
    digest: str
    size_bytes: int
    sections: tuple[Section, ...]
    num_examples: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    measurements: Mapping[str, Sequence[float]] = field(default_factory=dict)
    encoding: Encoding = Encoding.STATE_DICT


class Receipt(StrEnum):
    """The server's final word on an upload."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    REFUSED = "refused"
    LATE = "late"


class LeaveReason(StrEnum):
    """The reason why a client leaves a run before its end."""

    STOPPED = "stopped"
    """Somebody stopped its process."""
    GAVE_UP = "gave-up"
    """It can't do what the run asks for."""
    TASK_FAILED = "task-failed"
    """The task's own code failed."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """A client's goodbye: see Leave in federation.proto.

    `client_ids` is empty if all ids of the session leave.
    """

    reason: LeaveReason
    client_ids: tuple[int, ...] = ()
    coming_back: bool = False
    kept_order_ids: tuple[str, ...] = ()


class OrderEnd(StrEnum):
    """How an order ended without an update that counts."""

    ROUND_CLOSED = "round-closed"
    """The update was late: the round closed without it, or it is too stale."""
    ATTEMPT_FAILED = "attempt-failed"
    """The attempt failed for a reason that isn't this client's; the round is tried again."""
    GIVEN_UP = "given-up"
    """The client gave the order up or left, or the server lost it."""
    TAKEN_BACK = "taken-back"
    """The model that the order began with was taken back."""
    RUN_STOPPED = "run-stopped"
    """The run stopped early, with the model that the order began with."""
    OTHER = "other"
    """The order had ended with an update, or the server doesn't say how."""


@dataclass(frozen=True, kw_only=True)
class UploadAnswer:
    """A receipt.

    If it is REFUSED, `reason` says what is wrong; if it is LATE, `order_end` says how the order had
    ended.
    """

    receipt: Receipt
    reason: str = ""
    order_end: OrderEnd | None = None


@dataclass(frozen=True, kw_only=True)
class Counters:
    """A client's progress with an order; the numbers never decrease.

    `batches` counts training steps and evaluation batches, `evaluation_batches` the latter alone.
    """

    bytes_received: int = 0
    bytes_sent: int = 0
    batches: int = 0
    batches_total: int = 0
    replays: int = 0
    evaluation_batches: int = 0
    evaluation_batches_total: int = 0

    @property
    def steps(self) -> int:
        """The number of finished training steps."""
        return max(0, self.batches - self.evaluation_batches)

    @property
    def steps_total(self) -> int:
        """The number of training steps in the order; 0: not known yet."""
        return max(0, self.batches_total - self.evaluation_batches_total)

    @property
    def work(self) -> str:
        """The last finished step or evaluation batch in words; empty before the first."""
        if not self.batches:
            return ""
        if not self.steps:
            done, total = self.evaluation_batches, self.evaluation_batches_total
            return f"evaluating, batch {done} of {total}"
        return f"step {self.steps} of {self.steps_total}"


MAX_INCIDENTS = 64
"""The largest number of incidents of an order; they are numbered from 1."""

INCIDENT_NUMBERS = frozenset({"lr", "batch", "loss", *(f"grad_norm_{age}" for age in range(5))})
"""The numbers an incident may carry; `fedrounds.training.loop.NonFiniteError` explains them."""

MAX_WEIGHT = 2**29 - 1
"""The largest weight of an update, its num_examples: beyond it num_examples * float32 isn't exact
in float64 any more (see fedrounds.strategies.means)."""

MAX_METRIC = 1e30
"""The largest absolute value of a metric that an update may carry: beyond it a sum over clients
could overflow. A client leaves such a metric out."""

MAX_SUMS = 4096
"""The largest number of values in the state of a metric that is pooled over clients."""

METRIC_NAMES = frozenset(
    {
        "accuracy",
        "loss",
        "train_s",
        "global_accuracy",
        "global_loss",
        "global_examples",
        "personal_accuracy",
        "personal_loss",
        "personal_examples",
        "compression_error",
    }
)
"""The metrics an update may carry.

accuracy, loss: share of right answers and mean loss over the last local epoch. train_s: seconds of
training. global_*: if the order asks, how good the global model was before this training, and on
how many examples (see WorkOrder). personal_*: the same for the client's own model after this
training, if the client algorithm has a personal model. compression_error: the L2 norm of what
compression lost over that of the delta."""

"""The values both sides speak of. Frozen, without behaviour that knows a wire or a database."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a client trains in one round; sent with every order.

    `lr` is the step size, `clip_norm` the largest global L2 norm of a gradient (None: no
    clipping). `log_steps` prints a line every that many steps (0: never).
    """

    epochs: int = 2
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None


class IncidentKind(StrEnum):
    """What can go wrong in a run, by its name on the wire and in the history."""

    NON_FINITE_LOSS = "non-finite-loss"
    NON_FINITE_GRADIENT = "non-finite-gradient"
    NON_FINITE_PARAMETER = "non-finite-parameter"
    TRAINING_FAILED = "training-failed"
    UPDATE_REFUSED = "update-refused"
    UPDATE_LATE = "update-late"
    CLIENT_STALLED = "client-stalled"
    CLIENT_LOST = "client-lost"
    CLIENT_STATE_LOST = "client-state-lost"
    ROUND_FAILED = "round-failed"
    SERVER_RESTARTED = "server-restarted"
    EVALUATION_COLLAPSED = "evaluation-collapsed"


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that went wrong, with the numbers that show it.

    `step` counts optimizer steps of the order from 1; `tensor` is a declared entry of the
    model's state_dict; `detail` holds numbers only, so that no private text can travel in it.
    """

    kind: IncidentKind
    step: int | None = None
    epoch: int | None = None
    tensor: str | None = None
    detail: Mapping[str, float] = field(default_factory=dict)

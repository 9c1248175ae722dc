"""What the doctor says of a training that went wrong: values without torch, fit for the wire.

Nothing here holds an example, a label or a free text: enums, counts, numbers, names of modules and
tensors that the model declares, and names of torch's operations. Positions of samples are private;
`without_samples` takes them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Symptom(StrEnum):
    """What was noticed first."""

    NON_FINITE_INPUT = "non-finite-input"
    LABEL_OUT_OF_RANGE = "label-out-of-range"
    STEP_FAILED = "step-failed"
    """Forward, loss or backward raised an error."""
    NON_FINITE_FORWARD = "non-finite-forward"
    NON_FINITE_LOSS = "non-finite-loss"
    NON_FINITE_GRADIENT = "non-finite-gradient"
    NON_FINITE_OPTIMIZER_STATE = "non-finite-optimizer-state"
    NON_FINITE_PARAMETER = "non-finite-parameter"
    NON_FINITE_BUFFER = "non-finite-buffer"
    LOSS_EXPLOSION = "loss-explosion"
    DEAD_NETWORK = "dead-network"
    """Every weight's gradient is exactly zero though the loss isn't."""
    COLLAPSE = "collapse"
    """One class is the answer to everything though the labels hold others."""
    LOST_UPDATES = "lost-updates"
    """Weights of 16 bits stay as they are, because most of each update is rounded away."""


class Cause(StrEnum):
    """Why it happened, as the experiments prove it."""

    BAD_LABEL = "bad-label"
    BAD_DATA = "bad-data"
    DEGENERATE_BATCH = "degenerate-batch"
    LOSS_FUNCTION = "loss-function"
    PRECISION = "precision"
    OPTIMIZER_STATE = "optimizer-state"
    RECEIVED_MODEL = "received-model"
    BAD_INITIALISATION = "bad-initialisation"
    EXPLODING_GRADIENT = "exploding-gradient"
    LEARNING_RATE = "learning-rate"
    NOT_REPRODUCIBLE = "not-reproducible"
    """The same steps from the same state gave other bits: no cause is claimed."""
    UNKNOWN = "unknown"


class StepPhase(StrEnum):
    """The part of a step that first produced a bad value."""

    INPUT = "input"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Oddity(StrEnum):
    """What is odd about a sample."""

    NAN = "nan"
    INFINITY = "infinity"
    OUTLIER = "outlier"
    """Far from the other samples; the value is how many of their standard deviations."""
    LABEL_OUT_OF_RANGE = "label-out-of-range"
    EMPTY = "empty"
    NONE = "none"
    """Nothing to be seen, but training fails with it and not without."""


class ExperimentName(StrEnum):
    """One thing changed, everything else as it was; did the same steps go well?"""

    UNCHANGED = "unchanged"
    WITHOUT_SAMPLES = "without-samples"
    INPUTS_SANITISED = "inputs-sanitised"
    WITHOUT_BATCH = "without-batch"
    LARGER_BATCH = "larger-batch"
    """The batch joined with an earlier batch that went well."""
    GUARDED_LOSS = "guarded-loss"
    """The loss's logarithms, quotients, roots and exponentials kept off what they aren't
    defined or finite for."""
    FLOAT32 = "float32"
    """What was computed in fewer bits, in float32."""
    FLOAT64 = "float64"
    FRESH_OPTIMIZER = "fresh-optimizer"
    FRESH_INITIALISATION = "fresh-initialisation"
    CLIPPED_GRADIENT = "clipped-gradient"
    LOWER_RATE = "lower-rate"


class RemedyKind(StrEnum):
    """What was done so that training went on."""

    NONE = "none"
    """Nothing; training stopped without a result unless `is_working`."""
    LOWER_RATE = "lower-rate"
    """`value` is the factor on the rate; the rate warms up again."""
    CLIP_GRADIENT = "clip-gradient"
    """`value` is the largest global L2 norm of a gradient from now on."""
    DROP_SAMPLES = "drop-samples"
    """Samples with the named oddity are left out of every batch from now on; `value` is the
    largest absolute input that stays."""
    SANITISE_INPUTS = "sanitise-inputs"
    """Non-finite inputs are zero from now on, others at most `value`."""
    SKIP_BATCH = "skip-batch"
    """The batch was left out."""
    GUARD_LOSS = "guard-loss"
    """The guarded loss stays."""
    USE_FLOAT32 = "use-float32"
    """Training goes on in float32."""
    RESET_OPTIMIZER = "reset-optimizer"
    """The optimizer began anew without history."""
    REPEAT = "repeat"
    """The same steps were taken once more, unchanged, and went well."""


class RemedyPolicy(StrEnum):
    """What may be done about a cause."""

    REPORT = "report"
    """Report the cause and stop: no result."""
    SKIP = "skip"
    """Leave the batch out and go on."""
    CURE = "cure"
    """Apply the smallest remedy that the experiments showed to work, and go on."""


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What the doctor may do.

    `policies` name causes for which something else than the default is done; `max_remedies` is how
    many remedies a training may get; `memory_bytes` bounds the states and batches kept. Of the
    samples, and of the steps, at most `max_left_out` may be left out. Beyond it training goes on
    with all of them, but for steps whose gradient isn't finite; without `goes_on_beyond` it stops.
    Weights that were bad from the start are reported; with `stops_at_bad_start` they end training,
    for a service that can send others.
    An examination ends after the time of 200 steps, or 30 s if that is more, and in any case after
    `max_diagnosis_s`; then the diagnosis says what is known. Disarmed, the doctor only stops at
    what isn't finite: it keeps, diagnoses and cures nothing.
    """

    is_armed: bool = True
    default_policy: RemedyPolicy = RemedyPolicy.CURE
    policies: Mapping[Cause, RemedyPolicy] = field(default_factory=dict)
    max_remedies: int = 3
    max_left_out: float = 0.5
    goes_on_beyond: bool = True
    stops_at_bad_start: bool = False
    memory_bytes: int = 512 * 2**20
    max_diagnosis_s: float = 300.0

    def policy_for(self, cause: Cause) -> RemedyPolicy:
        """Return the policy for a cause."""
        return self.policies.get(cause, self.default_policy)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the first bad value was produced, not passed on.

    `module` is the dotted name of the innermost module at work, empty for the model itself and for
    what happens outside of it; `operation` is torch's name of the operation, such as "log" or
    "addmm"; `tensor` a key of the state_dict where the value is one of its entries or their
    gradient. `first_index` is the position of the first bad number in a tensor of `shape`.
    """

    phase: StepPhase
    module: str = ""
    operation: str = ""
    tensor: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    num_nan: int = 0
    num_inf: int = 0
    first_index: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SuspectSample:
    """A sample without which the step goes well.

    `position` counts from 0 in the batch, `index` in the data set where that is known, else -1.
    `value` is the number that shows the oddity: standard deviations, or how many numbers are NaN.
    """

    position: int
    index: int = -1
    oddity: Oddity
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Whether the same steps went well with one thing changed.

    `value` is the number it was tried with (a factor on the rate, a norm to clip at), `loss` the
    last loss it came to (nan where there was none), `failed_at_step` 0 where it went well.
    """

    name: ExperimentName
    is_healed: bool
    value: float = 0.0
    loss: float = float("nan")
    failed_at_step: int = 0


@dataclass(frozen=True, kw_only=True)
class TrendPoint:
    """A step on the way to the bad step; `largest_weight` is the largest absolute parameter."""

    step: int
    loss: float
    grad_norm: float
    largest_weight: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What was done; `is_working` is whether training then went on past the bad step."""

    kind: RemedyKind
    value: float = 0.0
    oddity: Oddity = Oddity.NONE
    is_working: bool = False


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A training that went wrong: what, where, which samples, why and what was done.

    `step` counts optimizer steps from 1 over all epochs, `batch` from 1 in its epoch: the step in
    which the bad value came up, `noticed_at_step` the step in which it was noticed; `lr` and
    `batch_size` are those of the bad step, `returned_to_step` the last good step that training
    went back to. `samples` are at most MAX_SAMPLES. `experiments` are in the order in which they
    were made, `contributing` those that also heal it without being the cause. `seconds` is how
    long all of it took.
    """

    symptom: Symptom
    cause: Cause
    step: int
    noticed_at_step: int
    epoch: int
    batch: int
    batch_size: int
    lr: float
    origin: Origin
    samples: tuple[SuspectSample, ...] = ()
    num_samples: int = 0
    experiments: tuple[Experiment, ...] = ()
    contributing: tuple[ExperimentName, ...] = ()
    trend: tuple[TrendPoint, ...] = ()
    remedy: Remedy = field(default_factory=lambda: Remedy(kind=RemedyKind.NONE))
    returned_to_step: int = 0
    num_replayed_steps: int = 0
    seconds: float = 0.0
    detail: Mapping[str, float] = field(default_factory=dict)

    def without_samples(self) -> "Diagnosis":
        """Return the same without positions and indices of samples: these may be private."""
        # The first index of a tensor that holds samples names the sample, too.
        return replace(self, samples=(), origin=replace(self.origin, first_index=()))


MAX_SAMPLES = 64
MAX_TREND = 16
MAX_EXPERIMENTS = 32
MAX_DIMENSIONS = 16

DIAGNOSIS_NUMBERS = frozenset({"clip_norm", "healthy_grad_norm", "largest_input", "loss_bound"})
"""The names that a diagnosis's `detail` may hold: others can't be sent."""

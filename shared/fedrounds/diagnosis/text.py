"""A diagnosis in words: the verdict in one sentence, its evidence as the rows of small tables.

For both sides: the server's terminal, history and `show`, the client's log and its `doctor`.
"""

import math
from collections.abc import Mapping, Sequence

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Oddity,
    RemedyKind,
    Symptom,
)

Rows = Sequence[Sequence[str]]

EXPERIMENT_HEADINGS = ("experiment", "value", "result", "loss")
TREND_HEADINGS = ("step", "loss", "gradient", "weight", "rate")

_MAX_LISTED = 8
"""The number of samples that are listed singly."""

_SYMPTOMS: Mapping[Symptom, str] = {
    Symptom.NON_FINITE_INPUT: "the input isn't finite",
    Symptom.LABEL_OUT_OF_RANGE: "a label is out of range",
    Symptom.STEP_FAILED: "the step failed with an error",
    Symptom.NON_FINITE_FORWARD: "an activation isn't finite",
    Symptom.NON_FINITE_LOSS: "the loss isn't finite",
    Symptom.NON_FINITE_GRADIENT: "a gradient isn't finite",
    Symptom.NON_FINITE_OPTIMIZER_STATE: "the optimizer's state isn't finite",
    Symptom.NON_FINITE_PARAMETER: "a weight isn't finite",
    Symptom.NON_FINITE_BUFFER: "a buffer isn't finite",
    Symptom.LOSS_EXPLOSION: "the loss exploded",
    Symptom.DEAD_NETWORK: "every gradient is zero",
    Symptom.COLLAPSE: "one class is the answer to everything",
    Symptom.LOST_UPDATES: "most of an update is rounded away in 16 bits",
}
_ODDITIES: Mapping[Oddity, str] = {
    Oddity.NAN: "NaN in the input",
    Oddity.INFINITY: "an infinity in the input",
    Oddity.OUTLIER: "an input far from all others",
    Oddity.LABEL_OUT_OF_RANGE: "a label out of range",
    Oddity.EMPTY: "nothing in it",
    Oddity.NONE: "nothing odd to be seen",
}
_EXPERIMENTS: dict[ExperimentName, str] = {
    ExperimentName.UNCHANGED: "unchanged",
    ExperimentName.WITHOUT_SAMPLES: "without the suspects",
    ExperimentName.INPUTS_SANITISED: "inputs sanitised",
    ExperimentName.WITHOUT_BATCH: "without the batch",
    ExperimentName.LARGER_BATCH: "joined with a good batch",
    ExperimentName.GUARDED_LOSS: "loss guarded",
    ExperimentName.FLOAT32: "in float32",
    ExperimentName.FLOAT64: "in float64",
    ExperimentName.FRESH_OPTIMIZER: "fresh optimizer",
    ExperimentName.FRESH_INITIALISATION: "fresh weights",
    ExperimentName.CLIPPED_GRADIENT: "gradient clipped at",
    ExperimentName.LOWER_RATE: "rate times",
}
_HEALING = _EXPERIMENTS | {
    ExperimentName.CLIPPED_GRADIENT: "clipping the gradient",
    ExperimentName.LOWER_RATE: "a lower rate",
}
_WITH_VALUE = {ExperimentName.CLIPPED_GRADIENT, ExperimentName.LOWER_RATE}
_OF_SAMPLES = {Cause.BAD_DATA, Cause.BAD_LABEL, Cause.DEGENERATE_BATCH}
_EXTRA_CAUSES = {
    Cause.NOT_REPRODUCIBLE: "the same steps went otherwise when repeated",
    Cause.UNKNOWN: "no experiment healed it",
}


def is_cured(diagnosis: Diagnosis) -> bool:
    """Whether training went on past the bad step, so that a result comes of it."""
    return diagnosis.remedy.kind is not RemedyKind.NONE and diagnosis.remedy.is_working


def verdict(diagnosis: Diagnosis) -> str:
    """Return cause, evidence and remedy in a sentence without its subject."""
    return f"{diagnosis.cause} at step {diagnosis.step} ({_shown(diagnosis)}): {_done(diagnosis)}"


def facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Return what is known of the fault's origin and of the samples, as (name, text)."""
    origin = diagnosis.origin
    origin_text = ", ".join(
        [
            f"{origin.phase} pass" if origin.phase in ("forward", "backward") else origin.phase,
            *([f"module {origin.module}"] if origin.module else []),
            *([f"operation {origin.operation}"] if origin.operation else []),
            *([f"tensor {origin.tensor}"] if origin.tensor else []),
        ]
    )
    bad_values = ""
    if origin.num_nan or origin.num_inf:
        size = math.prod(origin.shape) if origin.shape else 1
        dtype = f" ({origin.dtype})" if origin.dtype else ""
        first = f", the first at {_list(origin.first_index)}" if origin.first_index else ""
        bad_values = (
            f": {origin.num_nan} NaN and {origin.num_inf} infinite of {size} numbers{dtype}{first}"
        )
    rows = [
        ("what", _SYMPTOMS[diagnosis.symptom]),
        (
            "when",
            f"step {diagnosis.step} (epoch {diagnosis.epoch}, batch {diagnosis.batch}), noticed at "
            f"step {diagnosis.noticed_at_step}; rate {diagnosis.lr:.4g}, "
            f"{diagnosis.batch_size} samples a batch",
        ),
        ("where", origin_text + bad_values),
    ]
    if diagnosis.num_samples:
        rows.append(("samples", _samples(diagnosis)))
    if diagnosis.contributing:
        others = ", ".join(_HEALING[name] for name in diagnosis.contributing)
        rows.append(("heals it too", others))
    rows.append(("done", f"{_done(diagnosis)} ({_effort(diagnosis)})"))
    return rows


def experiment_rows(diagnosis: Diagnosis) -> Rows:
    """Return a row for each experiment, with the columns of EXPERIMENT_HEADINGS."""
    return [
        (
            _EXPERIMENTS[experiment.name],
            f"{experiment.value:.4g}" if experiment.value or experiment.name in _WITH_VALUE else "",
            outcome(experiment),
            ""
            if math.isnan(experiment.loss) and experiment.is_healed
            else f"{experiment.loss:.4g}",
        )
        for experiment in diagnosis.experiments
    ]


def outcome(experiment: Experiment) -> str:
    """Return how an experiment ended."""
    if experiment.is_healed:
        return "goes well"
    if experiment.failed_at_step:
        return f"fails at step {experiment.failed_at_step}"
    return "fails"


def trend_rows(diagnosis: Diagnosis) -> Rows:
    """Return a row for each step on the way, with the columns of TREND_HEADINGS."""
    return [
        (
            str(point.step) + ("  bad" if point.step == diagnosis.step else ""),
            *(
                f"{value:.4g}"
                for value in (point.loss, point.grad_norm, point.largest_weight, point.lr)
            ),
        )
        for point in diagnosis.trend
    ]


def _shown(diagnosis: Diagnosis) -> str:
    """Return the evidence in a few words."""
    if diagnosis.cause in _EXTRA_CAUSES:
        return f"{_SYMPTOMS[diagnosis.symptom]}; {_EXTRA_CAUSES[diagnosis.cause]}"
    if diagnosis.num_samples and diagnosis.cause in _OF_SAMPLES:
        odd = diagnosis.remedy.oddity
        oddities = {sample.oddity for sample in diagnosis.samples} or {odd} - {Oddity.NONE}
        how = " or ".join(text for oddity, text in _ODDITIES.items() if oddity in oddities)
        return _number_of("sample", diagnosis.num_samples) + (f" with {how}" if how else "")
    origin = diagnosis.origin
    where = origin.tensor or origin.module
    by = f" from {origin.operation}" if origin.operation else ""
    return _SYMPTOMS[diagnosis.symptom] + by + (f" in {where}" if where else "")


def _done(diagnosis: Diagnosis) -> str:
    remedy = diagnosis.remedy
    if remedy.kind is RemedyKind.NONE:
        if diagnosis.symptom is Symptom.LOST_UPDATES:
            return "float32 heals it, training went on as it is"
        if remedy.is_working:
            return "nothing helped, training went on"
        return "training stopped, no update"
    what = {
        RemedyKind.LOWER_RATE: f"rate times {remedy.value:.4g}",
        RemedyKind.CLIP_GRADIENT: f"gradient clipped at {remedy.value:.4g}",
        RemedyKind.DROP_SAMPLES: "dropped",
        RemedyKind.SANITISE_INPUTS: "inputs sanitised",
        RemedyKind.SKIP_BATCH: "the batch left out",
        RemedyKind.GUARD_LOSS: "the loss guarded",
        RemedyKind.USE_FLOAT32: "float32 from here on",
        RemedyKind.RESET_OPTIMIZER: "the optimizer begun anew",
        RemedyKind.REPEAT: "the same steps once more",
    }[remedy.kind]
    return what + (", training went on" if remedy.is_working else " in vain")


def _samples(diagnosis: Diagnosis) -> str:
    if not diagnosis.samples:
        return f"{diagnosis.num_samples}, which ones isn't told"
    listed = "; ".join(
        (f"number {sample.index}" if sample.index >= 0 else f"position {sample.position}")
        + f" ({_ODDITIES[sample.oddity]}{f', {sample.value:.4g}' if sample.value else ''})"
        for sample in diagnosis.samples[:_MAX_LISTED]
    )
    more = diagnosis.num_samples - min(len(diagnosis.samples), _MAX_LISTED)
    return listed + (f" and {more} more" if more > 0 else "")


def _effort(diagnosis: Diagnosis) -> str:
    back = f"back to step {diagnosis.returned_to_step}, " if diagnosis.returned_to_step else ""
    replayed = _number_of("step", diagnosis.num_replayed_steps)
    return f"{back}{replayed} replayed, {diagnosis.seconds:.1f} s"


def _number_of(what: str, number: int) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _list(index: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, index)) + "]"

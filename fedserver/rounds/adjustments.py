"""What the server changes in training when clients agree on a cause, and for how long.

    learning-rate             the rate is multiplied by what healed it for them, at most by 0.5
    exploding-gradient        gradients are clipped at the median of the norms that healed it
    bad-initialisation        in round 1 the first model is drawn anew
    the new model is bad      its round is repeated with half the rate, and half the width of the
                              band that a cohort's norms must lie in

A function of what is stored of an attempt: the adjustments in force, and the diagnoses that came.
Each rule takes at most `max_steps` steps in a row; a round that went well takes a step back:
the rate, the band and the norm to clip at double, until they are the settings' again.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedrounds.diagnosis.values import Cause, Diagnosis, Experiment, ExperimentName, RemedyKind
from fedrounds.types import TrainingConfig
from fedserver.records import Adjustments

MIN_AGREEING = 2
MIN_SHARE = 1 / 3
"""Of the clients that answered, how many must report a cause for the server to act on it."""

MAX_REDRAWS = 2
NUM_DOUBLINGS = 3
"""After so many rounds that went well the gradient isn't clipped any more than set."""

_MOST_FACTOR = 0.5
_LEAST_FACTOR = 0.1
# Half of the band leaves room for honest clients; less wouldn't (docs/results.md).
_LEAST_BAND_FACTOR = 0.5
# Whatever clients report: no norm is to end learning, or to be beyond what float64 can double.
_LEAST_NORM, _MOST_NORM = 1e-4, 1e6

Reports = Sequence[tuple[int, Diagnosis]]


@dataclass(frozen=True, kw_only=True)
class SharedCause:
    """A cause that several clients report, and what is changed because of it, in words."""

    cause: Cause
    clients: tuple[int, ...]
    num_answers: int
    change: str


def adjusted(training: TrainingConfig, adjustments: Adjustments) -> TrainingConfig:
    """Return the training configuration with these adjustments."""
    norms = [norm for norm in (training.clip_norm, adjustments.clip_norm) if norm is not None]
    return replace(
        training, lr=training.lr * adjustments.lr_factor, clip_norm=min(norms, default=None)
    )


def after_attempt(
    before: Adjustments,
    reports: Reports,
    *,
    round_number: int,
    is_done: bool,
    num_answers: int,
    max_steps: int,
) -> tuple[Adjustments, list[SharedCause]]:
    """Return the adjustments that follow an attempt, and the causes its clients agree on.

    `reports` are all diagnoses under the adjustments in force with the clients they came from,
    `num_answers` is how many clients answered at all, with an update or a diagnosis; `is_done`
    whether the attempt made a model. With a `max_steps` of 0 nothing is changed or taken back.
    """
    after = before
    shared = []
    agreed = _agreed(reports, num_answers=num_answers)
    for cause, by_client in agreed.items():
        changed = _after_cause(
            after, cause, by_client, is_first=round_number == 1 and not is_done, max_steps=max_steps
        )
        shared.append(
            SharedCause(
                cause=cause,
                clients=tuple(sorted(by_client)),
                num_answers=num_answers,
                change=_change(after, changed, has_remedy=cause in _REMEDIED, max_steps=max_steps),
            )
        )
        after = changed
    if is_done and max_steps:
        reported = {diagnosis.cause for _, diagnosis in reports}
        after = _released(after, reported)
    return after, shared


def after_bad_model(before: Adjustments, *, max_steps: int) -> Adjustments:
    """Return the adjustments with which a round is repeated whose model was bad."""
    if not max_steps:
        return before
    return replace(
        _lowered(before, _MOST_FACTOR, max_steps=max_steps),
        norm_band_factor=max(_LEAST_BAND_FACTOR, before.norm_band_factor / 2),
    )


def adjustment_text(adjustments: Adjustments) -> str:
    """Return the adjustments in words; empty where nothing is adjusted."""
    words = []
    if adjustments.lr_factor != 1:
        words.append(f"rate times {adjustments.lr_factor:g}")
    if adjustments.clip_norm is not None:
        words.append(f"gradients clipped at {adjustments.clip_norm:.4g}")
    if adjustments.norm_band_factor != 1:
        words.append(f"norm band times {adjustments.norm_band_factor:g}")
    if adjustments.num_redraws:
        words.append(f"first model drawn anew ({adjustments.num_redraws})")
    return ", ".join(words)


def _agreed(reports: Reports, *, num_answers: int) -> dict[Cause, dict[int, list[Diagnosis]]]:
    """Return the causes that enough clients report, each with its clients' diagnoses of it."""
    by_cause: dict[Cause, dict[int, list[Diagnosis]]] = {}
    for client_id, diagnosis in reports:
        by_cause.setdefault(diagnosis.cause, {}).setdefault(client_id, []).append(diagnosis)
    return {
        cause: by_cause[cause]
        for cause in Cause
        if len(by_cause.get(cause, {})) >= max(MIN_AGREEING, MIN_SHARE * num_answers)
    }


_REMEDIED = {Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT, Cause.BAD_INITIALISATION}


def _after_cause(
    before: Adjustments,
    cause: Cause,
    by_client: Mapping[int, Sequence[Diagnosis]],
    *,
    is_first: bool,
    max_steps: int,
) -> Adjustments:
    if cause is Cause.LEARNING_RATE:
        factors = _healing_values(by_client, ExperimentName.LOWER_RATE, RemedyKind.LOWER_RATE)
        factor = min(factors, default=_MOST_FACTOR)
        return _lowered(before, factor, max_steps=max_steps)
    if cause is Cause.EXPLODING_GRADIENT and before.num_clipped < max_steps:
        norms = _healing_values(
            by_client, ExperimentName.CLIPPED_GRADIENT, RemedyKind.CLIP_GRADIENT, below=math.inf
        )
        if not norms:
            return before
        norm = statistics.median(min(_MOST_NORM, max(_LEAST_NORM, norm)) for norm in norms)
        if before.clip_norm is not None:
            norm = min(norm, before.clip_norm / 2)
        return replace(before, clip_norm=norm, num_clipped=before.num_clipped + 1, num_doublings=0)
    if cause is Cause.BAD_INITIALISATION and is_first:
        most = min(MAX_REDRAWS, max_steps)
        return replace(before, num_redraws=min(most, before.num_redraws + 1))
    return before


def _healing_values(
    by_client: Mapping[int, Sequence[Diagnosis]],
    experiment: ExperimentName,
    remedy: RemedyKind,
    *,
    below: float = 1.0,
) -> list[float]:
    """Return for each client the gentlest value that healed what it reports."""
    values = []
    for diagnoses in by_client.values():
        gentlest = []
        for diagnosis in diagnoses:
            healing = [
                *(tried.value for tried in diagnosis.experiments if _healed(tried, experiment)),
                *([diagnosis.remedy.value] if diagnosis.remedy.kind is remedy else []),
            ]
            allowed = [value for value in healing if 0 < value < below]
            gentlest += [max(allowed)] if allowed else []
        if gentlest:
            values.append(min(gentlest))
    return values


def _healed(tried: Experiment, name: ExperimentName) -> bool:
    return tried.name is name and tried.is_healed


def _lowered(before: Adjustments, factor: float, *, max_steps: int) -> Adjustments:
    if before.num_lowered >= max_steps:
        return before
    bounded = min(_MOST_FACTOR, max(_LEAST_FACTOR, factor))
    return replace(before, lr_factor=before.lr_factor * bounded, num_lowered=before.num_lowered + 1)


def _released(before: Adjustments, reported: set[Cause]) -> Adjustments:
    """Take back a step of each adjustment whose cause no client reports any more."""
    after = replace(before, norm_band_factor=min(1.0, 2 * before.norm_band_factor))
    if Cause.LEARNING_RATE not in reported and before.num_lowered:
        factor = min(1.0, 2 * before.lr_factor)
        after = replace(
            after, lr_factor=factor, num_lowered=0 if factor == 1 else before.num_lowered
        )
    if Cause.EXPLODING_GRADIENT not in reported and before.clip_norm is not None:
        if before.num_doublings + 1 >= NUM_DOUBLINGS:
            return replace(after, clip_norm=None, num_clipped=0, num_doublings=0)
        after = replace(
            after, clip_norm=2 * before.clip_norm, num_doublings=before.num_doublings + 1
        )
    return after


def _change(before: Adjustments, after: Adjustments, *, has_remedy: bool, max_steps: int) -> str:
    if after != before:
        return f"{adjustment_text(after)} from the next attempt on"
    if not max_steps:
        return "nothing is changed: --max-adjustments is 0"
    if has_remedy:
        return "nothing is changed: no further step is allowed, or none is known to help"
    return "nothing is changed: no setting of a round would help"

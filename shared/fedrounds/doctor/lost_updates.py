"""Weights of 16 bits that don't move: an update below half of the distance to the next number.

A weight of 0.1 in bfloat16 has its neighbours at a distance of 0.0005; what is smaller than half of
that is rounded away in each step anew. Nothing about it isn't finite, and the loss falls, slowly.
"""

import math
from functools import partial
from itertools import compress

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Origin,
    Remedy,
    RemedyKind,
    StepPhase,
    Symptom,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.history import Recorded, Snapshot
from fedrounds.doctor.plain import Progress
from fedrounds.doctor.retaking import Retaking
from fedrounds.doctor.session import Session
from fedrounds.doctor.stepping import NARROW, Overrides

FIRST_LOOK = 48
"""After so many steps it is looked for, once."""
_MOST = 0.5
_LARGEST = 128 * 2**20
"""States of more bytes aren't looked at: float32 takes twice as much memory."""
_SLOWER = 0.02
"""In 16 bits the loss is higher by at least this share of the first loss."""


def look_for_lost_updates(session: Session, progress: Progress) -> Diagnosis | None:
    """Return the diagnosis of weights that lose most of their update, None where they don't.

    Two things are measured: of a step's update in float32, the share that falls on weights that the
    step in 16 bits leaves as they were; and the loss that the same steps lead to in float32. The
    training is left as it is, and isn't converted: its own code expects the dtype that it has.
    """
    training, steps = session.training, list(session.history.steps)
    starts = [state for state in session.history.snapshots if state.step < session.step]
    has_narrow = any(weight.dtype in NARROW for weight in training.learning)
    if not has_narrow or not starts or starts[-1].num_bytes > _LARGEST:
        return None
    progress.set_aside(training, session.device)
    retaking = Retaking(training=training, steps=steps, on_replay=session.on_replay)
    lost = _share_lost(retaking, starts[-1], session.treatment)
    level = math.inf
    if lost >= _MOST:
        widening, widen = interventions.widening(), partial(interventions.widen, training)
        level = retaking.level_from(starts[0], widening(session.treatment), prepare=widen)
    progress.put_back(session.device)
    least = _SLOWER * abs(session.monitor.first_level)
    return _diagnosis(steps[-1], level) if level <= retaking.live_level() - least else None


def _share_lost(retaking: Retaking, start: Snapshot, treatment: Overrides) -> float:
    """Return the share of a step's update in float32 that weights of 16 bits lose as they are."""
    training = retaking.training
    is_narrow = [weight.dtype in NARROW for weight in training.learning]
    made = retaking.update_from(start, treatment)
    intended = retaking.update_from(
        start,
        interventions.widening()(treatment),
        prepare=partial(interventions.widen, training),
    )
    total = lost = 0.0
    for now, wanted in compress(zip(made, intended, strict=True), is_narrow):
        total += float(wanted.abs().sum())
        lost += float(wanted[now == 0].abs().sum())
    return lost / total if total > 0 else 0.0


def _diagnosis(step: Recorded, level: float) -> Diagnosis:
    return Diagnosis(
        symptom=Symptom.LOST_UPDATES,
        cause=Cause.PRECISION,
        step=step.step,
        noticed_at_step=step.step,
        epoch=step.epoch,
        batch=step.batch_number,
        batch_size=step.outcome.batch_size,
        lr=step.outcome.lr,
        origin=Origin(phase=StepPhase.OPTIMIZER),
        experiments=(
            Experiment(name=ExperimentName.UNCHANGED, is_healed=False, failed_at_step=step.step),
            Experiment(name=ExperimentName.FLOAT32, is_healed=True, loss=level),
        ),
        remedy=Remedy(kind=RemedyKind.NONE, is_working=True),
    )

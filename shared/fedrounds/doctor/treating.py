"""Treating a training: from a symptom to a remedy in force, and its release."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    DoctorSettings,
    Oddity,
    Remedy,
    RemedyKind,
    RemedyPolicy,
    Symptom,
    TrendPoint,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.examination import blame_outliers, examine
from fedrounds.doctor.findings import Case, Finding, diagnosis_of, unexplained
from fedrounds.doctor.floor import Floor, restore_weights
from fedrounds.doctor.history import (
    Recorded,
    Snapshot,
    StepHistory,
    is_finite,
    take_snapshot,
)
from fedrounds.doctor.left_out import LeftOut
from fedrounds.doctor.monitor import INTERVAL
from fedrounds.doctor.nan_guard import trend_point
from fedrounds.doctor.plain import Progress
from fedrounds.doctor.release import Release
from fedrounds.doctor.remedies import (
    OF_THE_RATE,
    OF_THE_START,
    Allowance,
    applied,
    candidates_for,
    holds_left_out,
    leaving_out_earlier,
)
from fedrounds.doctor.reports import TrainingHalted
from fedrounds.doctor.retaking import Preparation, Retaking, nothing, preparation
from fedrounds.doctor.session import Session
from fedrounds.doctor.stepping import UNTREATED, Attempt, Overrides, StepOutcome
from fedrounds.doctor.suspicion import CERTAIN, SUSPICIONS, Quiet, Suspicion, choose, has_risen

logger = logging.getLogger(__name__)

_NUM_TREND = 5
_MAX_STEPS = 200
_LEAST_S = 30.0
"""An examination may take the time of so many steps, or so many seconds."""
_APART = 32
"""Two bad steps so far apart may be unrelated; nearer to each other, skipping isn't enough."""
_SPOILT = 0.5
"""A loss that is higher than usual by this share of it isn't what it was."""
_LEAST_GAIN = 0.1
"""Going back further than to the last good state has to lower the loss by this share."""
_NUM_ALIKE = 3
"""After so many batches left out for the same symptom the next is left out without asking why."""


class StepError(Exception):
    """The step fails with an error that no experiment explains: the loop is to see it."""


class Treatments:
    """Decides what is done about a training's symptoms, and does it.

    Owns what was learned about them: the suspicion that is watched, the remedies left, the samples
    left out, and whether a remedy is being eased. Once `floor` is there nothing more is treated,
    and it takes the steps.
    """

    def __init__(
        self,
        session: Session,
        settings: DoctorSettings,
        *,
        is_initial: bool,
        fresh_state: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._session = session
        self._settings = settings
        self._is_initial = is_initial
        self._fresh_state = fresh_state
        self._allowance = Allowance(settings.max_remedies, max_share=settings.max_left_out)
        self._dismissed: set[Symptom] = set()
        self._quiet = Quiet()
        self._skipped_for_rate = -math.inf
        self.left_out = LeftOut(max_share=settings.max_left_out)
        self.suspicion: Suspicion | None = None
        self.release = Release()
        self.floor: Floor | None = None

    def is_dismissed(self, symptom: Symptom) -> bool:
        """Whether a symptom was looked into before, and was none."""
        return symptom in self._dismissed

    def begin_anew(self) -> None:
        """Forget what was being watched or eased: from here on the training is a new one."""
        self.suspicion = None
        self.release.stop()

    def suspect(self, symptom: Symptom, outcome: StepOutcome) -> None:
        """Watch from here on whether a suspicion persists, if none is being watched."""
        step, history = self._session.step, self._session.history
        is_known = symptom in self._dismissed or self._quiet.holds(step)
        if self.suspicion is not None or is_known:
            return
        earlier = [snapshot for snapshot in history.snapshots if snapshot.step < step]
        if not earlier:
            return
        self.suspicion = Suspicion(
            symptom=symptom,
            step=step,
            start=earlier[-1],
            usual=self._session.monitor.usual_loss(before=step),
            bar=self._session.monitor.bar(outcome),
        )
        history.pin(earlier[-1])

    def _examined(
        self,
        symptom: Symptom,
        history: StepHistory,
        *,
        is_tried: bool = True,
        look: Callable[[Case], Finding | None] = examine,
    ) -> Finding | None:
        """Return what an examination of the newest step of a history comes to."""
        return look(
            Case(
                training=self._session.training,
                history=history,
                symptom=symptom,
                is_tried=is_tried,
                level=self._session.monitor.first_level,
                usual_norm=self._session.monitor.usual_norm,
                is_initial=self._is_initial,
                fresh_state=self._fresh_state,
                on_replay=self._session.on_replay,
                max_seconds=max(_MAX_STEPS * self._session.step_seconds, _LEAST_S),
                longest_s=self._settings.max_diagnosis_s,
            )
        )

    def treat(
        self,
        symptom: Symptom,
        outcome: StepOutcome,
        progress: Progress,
        *,
        is_tried: bool = True,
    ) -> StepOutcome:
        """Find out why, and go on if that can be; returns how the newest step went then."""
        began = time.monotonic()
        progress.set_aside(self._session.training, self._session.device)
        self.suspicion = None
        steps = list(self._session.history.steps)
        if self._is_known(symptom):
            again = self._skip_again(steps, progress)
            if again is not None:
                return again
            progress.put_back(self._session.device)
        tight = self.release.tightened(self._session.treatment) if is_tried else None
        if tight is not None:
            again = self._tighten(tight, steps)
            if again is not None:
                progress.restore_random_state(self._session.device)
                return again
            progress.put_back(self._session.device)
        finding = self._examined(symptom, self._session.history, is_tried=is_tried)
        if finding is None:
            progress.put_back(self._session.device)
            return self._dismiss(symptom, outcome)
        if outcome.error is not None and finding.cause is Cause.UNKNOWN:
            # Nothing says that it isn't a mistake in the model's code: its author is to see it.
            raise StepError from outcome.error
        diagnosis = self._diagnosis(finding, noticed_at=self._session.step)
        candidates = self._candidates(finding)
        for remedy in candidates:
            num_skipped = len(self._session.treatment.skips)
            if not self._allowance.grants(remedy, finding, num_skipped=num_skipped):
                continue
            if self._is_skip_in_vain(remedy, finding, steps):
                continue
            start, treatment = self._plan(remedy, finding, steps)
            again = self._apply(remedy, start, treatment, steps)
            if again is not None:
                progress.restore_random_state(self._session.device)
                returned = replace(diagnosis, returned_to_step=start.step)
                self._note_cure(returned, remedy, finding, began)
                return again
        is_over = (
            outcome.error is not None
            or self._is_asked_to_stop(finding.cause)
            or not self._has_returned_to_finite(progress)
        )
        # Without a remedy training goes on, too: the diagnosis says so.
        tried = candidates[-1] if candidates else replace(diagnosis.remedy, is_working=not is_over)
        self._session.tell(replace(diagnosis, remedy=tried, seconds=time.monotonic() - began))
        if is_over:
            raise TrainingHalted(self._session.diagnoses[-1]) from outcome.error
        return self._go_on_unhealed(steps[-1])

    def _is_skip_in_vain(self, remedy: Remedy, finding: Finding, steps: Sequence[Recorded]) -> bool:
        """Whether the harm of a high rate is more than that of the step where it began."""
        is_spike = remedy.kind is RemedyKind.SKIP_BATCH and finding.cause in OF_THE_RATE
        if not is_spike or finding.is_onset:
            return False
        usual = self._session.monitor.usual_loss(before=finding.onset.step)
        if usual is None:
            return True
        level = self._retaking(steps).level_under(remedy, finding, self._session.treatment)
        return level > usual + _SPOILT * abs(usual)

    def _is_asked_to_stop(self, cause: Cause) -> bool:
        """Whether a cause that has no remedy ends training."""
        if cause in OF_THE_START and self._settings.stops_at_bad_start:
            return True
        is_report = self._settings.policy_for(cause) is RemedyPolicy.REPORT
        return is_report or self._settings.max_remedies == 0

    def _has_returned_to_finite(self, progress: Progress) -> bool:
        """Go back to the newest weights that are finite; whether there are any."""
        session = self._session
        progress.put_back(session.device)
        if is_finite(session.training):
            return True
        for snapshot in reversed(session.history.snapshots):
            restore_weights(session.training, snapshot)
            if is_finite(session.training):
                return True
        return False

    def _go_on_unhealed(self, newest: Recorded) -> StepOutcome:
        """Treat nothing from here on; returns how the newest step goes then."""
        session = self._session
        self._end("nothing that was tried heals it")
        assert self.floor is not None
        if newest.outcome.is_finite:
            return newest.outcome
        newest.random_state.restore(session.device)
        return self.floor.take(newest.batch, step=newest.step, updates=newest.updates)

    def _end(self, why: str) -> None:
        """Treat nothing from here on, and say so."""
        logger.warning(
            "the doctor treats nothing from step %d on: %s; training goes on, without the steps "
            "whose gradient isn't finite",
            self._session.step,
            why,
        )
        session = self._session
        self.floor = Floor(session.training, session.treatment, step=session.step)
        session.history.clear()

    def look_into(self, outcome: StepOutcome, progress: Progress) -> StepOutcome:
        """Treat what a suspicion was about, if it persists and a remedy is shown to help."""
        began = time.monotonic()
        suspicion, self.suspicion = self.suspicion, None
        assert suspicion is not None
        is_kept = self._session.history.has_pinned()
        self._session.history.pin(None)
        # Where hardly any steps went before, going on from the same state has to tell.
        persists = suspicion.usual is None or self._session.monitor.persists(
            suspicion.symptom, bar=suspicion.bar
        )
        if not is_kept or not (persists or self._has_left_harm(suspicion)):
            return outcome
        progress.set_aside(self._session.training, self._session.device)
        steps = list(self._session.history.steps)
        earlier = self._session.history.until(suspicion.step)
        look = examine if persists else blame_outliers
        finding = self._examined(suspicion.symptom, earlier, look=look)
        remedy = None
        if finding is not None:
            remedy = self._best_remedy(suspicion, finding, self._retaking(steps))
        if finding is None or remedy is None:
            progress.put_back(self._session.device)
            self._tell_if_certain(suspicion, earlier.steps[-1], finding, began)
            if persists or finding is not None:
                self._quiet.begin(self._session.step)
            if suspicion.symptom is not Symptom.LOSS_EXPLOSION:
                self._dismissed.add(suspicion.symptom)
            return outcome
        diagnosis = self._diagnosis(finding, noticed_at=suspicion.step)
        is_report = self._settings.policy_for(finding.cause) is RemedyPolicy.REPORT
        if remedy.kind is RemedyKind.NONE or is_report:
            is_over = is_report or self._settings.stops_at_bad_start
            remedy = replace(diagnosis.remedy, is_working=not is_over)
            took_s = time.monotonic() - began
            self._session.tell(replace(diagnosis, remedy=remedy, seconds=took_s))
            if is_over:
                raise TrainingHalted(self._session.diagnoses[-1])
            progress.put_back(self._session.device)
            self._quiet.begin(self._session.step)
            self._dismissed.add(suspicion.symptom)
            return outcome
        num_skipped = len(self._session.treatment.skips)
        if self._allowance.grants(remedy, finding, num_skipped=num_skipped):
            start, treatment = self._plan(remedy, finding, steps)
            again = self._apply(remedy, start, treatment, steps)
            if again is not None:
                progress.restore_random_state(self._session.device)
                returned = replace(diagnosis, returned_to_step=start.step)
                self._note_cure(returned, remedy, finding, began)
                return again
        progress.put_back(self._session.device)
        self._quiet.begin(self._session.step)
        return outcome

    def _has_left_harm(self, suspicion: Suspicion) -> bool:
        """Whether the loss came down again from an explosion, but not to what was usual."""
        monitor, usual = self._session.monitor, suspicion.usual
        is_explosion = suspicion.symptom is Symptom.LOSS_EXPLOSION and usual is not None
        return is_explosion and has_risen(
            monitor.losses, usual=usual or 0.0, first_level=monitor.first_level
        )

    def _tell_if_certain(
        self, suspicion: Suspicion, step: Recorded, finding: Finding | None, began: float
    ) -> None:
        """Tell of a suspicion that nothing heals if there is no doubt of it; claim no cause."""
        persists = self._session.monitor.persists(suspicion.symptom, bar=suspicion.bar)
        if suspicion.symptom not in CERTAIN or not persists:
            return
        diagnosis = unexplained(suspicion.symptom, step, finding, trend=self._trend())
        self._session.tell(replace(diagnosis, seconds=time.monotonic() - began))

    def _best_remedy(
        self, suspicion: Suspicion, finding: Finding, retaking: Retaking
    ) -> Remedy | None:
        """Return the mildest remedy that going on shows to help, None if none does.

        Where the first weights are at fault, it is none of the client's to make: kind NONE.
        """
        if finding.cause in OF_THE_START:
            candidates = [Remedy(kind=RemedyKind.NONE)]
            start = next(iter(self._session.history.snapshots))
            fresh = self._fresh_state()
            levels = [retaking.level_of_fresh_weights(start, fresh, self._session.treatment)]
        else:
            candidates = self._candidates(finding, is_finite=True)
            levels = [
                retaking.level_under(remedy, finding, self._session.treatment)
                for remedy in candidates
            ]
        is_explosion = suspicion.symptom is Symptom.LOSS_EXPLOSION
        chosen = choose(
            retaking.live_level(),
            levels,
            usual=suspicion.usual if is_explosion else None,
            is_learning=is_explosion,
        )
        return None if chosen is None else candidates[chosen]

    def _candidates(self, finding: Finding, *, is_finite: bool = False) -> list[Remedy]:
        """Return what may be done about a cause, the mildest first."""
        since_skip = finding.bad_step.step - self._skipped_for_rate
        return candidates_for(
            finding,
            self._settings.policy_for(finding.cause),
            is_finite=is_finite,
            is_alone=since_skip > _APART,
        )

    def _is_known(self, symptom: Symptom) -> bool:
        """Whether the last diagnoses say that a step that shows this is best left out."""
        last = self._session.diagnoses[-_NUM_ALIKE:]
        return len(last) == _NUM_ALIKE and all(
            (diagnosis.remedy.kind, diagnosis.symptom) == (RemedyKind.SKIP_BATCH, symptom)
            for diagnosis in last
        )

    def _skip_again(self, steps: Sequence[Recorded], progress: Progress) -> StepOutcome | None:
        """Leave the newest step out, and say nothing new."""
        treatment = interventions.skipping(self._session.step)(self._session.treatment)
        again = self._take_again(self._session.history.snapshots[-1], steps, treatment)
        if again is not None:
            progress.restore_random_state(self._session.device)
            self._session.treatment = treatment
        return again

    def _tighten(self, tight: Overrides, steps: Sequence[Recorded]) -> StepOutcome | None:
        """Go on under a remedy as it was before it was eased, where that goes well."""
        retaking = self._retaking(steps)
        for start in reversed(self._session.history.snapshots):
            if math.isfinite(retaking.level_from(start, tight)):
                again = self._take_again(start, steps, tight)
                if again is not None:
                    logger.info("step %d: a remedy is eased no more", self._session.step)
                    self._session.treatment = tight
                return again
        return None

    def _note_cure(
        self, diagnosis: Diagnosis, remedy: Remedy, finding: Finding, began: float
    ) -> None:
        """Tell of a cure, and remember what it asks for later."""
        if remedy.kind in (RemedyKind.LOWER_RATE, RemedyKind.CLIP_GRADIENT):
            self.release.begin(self._session.treatment, step=self._session.step)
        if remedy.kind is RemedyKind.SKIP_BATCH and finding.cause in OF_THE_RATE:
            self._skipped_for_rate = finding.bad_step.step
        if remedy.kind is RemedyKind.DROP_SAMPLES and remedy.oddity is Oddity.NONE:
            self.left_out.indices |= {
                sample.index for sample in finding.samples if sample.index >= 0
            }
        cured = replace(remedy, is_working=True)
        self._session.tell(replace(diagnosis, remedy=cured, seconds=time.monotonic() - began))

    def _dismiss(self, symptom: Symptom, outcome: StepOutcome) -> StepOutcome:
        """Go on as if nothing had been noticed; the same suspicion isn't followed for ever."""
        assert is_finite(self._session.training), symptom
        self._dismissed.add(symptom)
        if not outcome.is_taken or math.isnan(outcome.loss):
            newest = self._session.history.steps.pop()
            outcome = self._session.take(newest.batch, Attempt(), updates=newest.updates)
            self._session.history.steps.append(newest._replace(outcome=outcome.without_tensors()))
        if self._session.history.is_snapshot_due(self._session.step) and is_finite(
            self._session.training
        ):
            self._session.history.keep(
                take_snapshot(self._session.training, step=self._session.step)
            )
        return outcome

    def _plan(
        self, remedy: Remedy, finding: Finding, steps: Sequence[Recorded]
    ) -> tuple[Snapshot, Overrides]:
        """Return the state to go back to for a remedy, and the overrides from there on.

        That is the last good state. For samples to leave out it is the last state before the first
        step that learned from them, where the steps since then lead to a lower loss.
        """
        session = self._session
        last_good = finding.return_to, applied(session.treatment, remedy, finding)
        if remedy.kind is not RemedyKind.DROP_SAMPLES:
            return last_good
        treatment = leaving_out_earlier(last_good[1], finding, steps)
        first = next(
            (
                recorded.step
                for recorded in steps
                if holds_left_out(recorded, treatment, session.training)
            ),
            None,
        )
        earlier = [state for state in session.history.snapshots if first and state.step < first]
        if not earlier or earlier[-1].step >= finding.return_to.step:
            return last_good
        retaking = self._retaking(steps)
        late = retaking.level_from(*last_good)
        is_better = retaking.level_from(earlier[-1], treatment) < late - _LEAST_GAIN * abs(late)
        return (earlier[-1], treatment) if is_better else last_good

    def _apply(
        self,
        remedy: Remedy,
        start: Snapshot,
        treatment: Overrides,
        recorded: Sequence[Recorded],
    ) -> StepOutcome | None:
        """Go back and take the steps since again under a remedy; None if that fails."""
        outcome = self._take_again(
            start,
            recorded,
            treatment,
            prepare=preparation(self._session.training, remedy),
            is_strict=remedy.kind is RemedyKind.REPEAT,
        )
        if outcome is not None:
            self._session.treatment = treatment
        return outcome

    def _take_again(
        self,
        start: Snapshot,
        recorded: Sequence[Recorded],
        treatment: Overrides,
        *,
        prepare: Preparation = nothing,
        is_strict: bool = False,
    ) -> StepOutcome | None:
        """Go back to a state and take the steps since once more; None if that fails."""
        return self._retaking(recorded).commit(
            start,
            treatment,
            self._session.history,
            self._session.monitor,
            prepare=prepare,
            is_strict=is_strict,
        )

    def _retaking(self, steps: Sequence[Recorded]) -> Retaking:
        return Retaking(
            training=self._session.training, steps=steps, on_replay=self._session.on_replay
        )

    def ease(self, outcome: StepOutcome, progress: Progress) -> StepOutcome:
        """Ease the treatment once more, or go back to where all went well if it did harm."""
        session, losses = self._session, self._session.monitor.losses
        if not self.release.does_well(losses, first_level=session.monitor.first_level):
            return self.take_back(None, outcome, progress)
        if self.suspicion is not None:
            # What is watched isn't mixed with what an easing does.
            return outcome
        start = take_snapshot(session.training, step=session.step)
        session.treatment = self.release.ease(session.treatment, start, losses, step=session.step)
        if self.release.checkpoint is not None:
            session.history.keep(start)
            session.history.pin(start)
        return outcome

    def judge_last_steps(self, outcome: StepOutcome, progress: Progress) -> None:
        """Go back to where all went well if what was eased did harm in the last steps."""
        session, checkpoint = self._session, self.release.checkpoint
        is_short = checkpoint is None or session.step < checkpoint.start.step + INTERVAL
        if not is_short and not self.release.does_well(
            session.monitor.losses, first_level=session.monitor.first_level
        ):
            self.take_back(None, outcome, progress)

    def take_back(
        self,
        symptom: Symptom | None,
        outcome: StepOutcome,
        progress: Progress,
        *,
        is_tried: bool = True,
    ) -> StepOutcome:
        """Go back to the last state in which all went well, under tighter overrides.

        Where even that fails, a symptom is treated as any other.
        """
        session, checkpoint = self._session, self.release.checkpoint
        assert checkpoint is not None
        progress.set_aside(session.training, session.device)
        self.suspicion = None
        session.history.pin(None)
        steps = session.history.between(checkpoint.start.step, session.step)
        treatment = replace(
            self.release.back(step=session.step),
            skips=session.treatment.skips,
            without=session.treatment.without,
        )
        again = None
        is_kept = len(steps) == session.step - checkpoint.start.step
        if is_kept and math.isfinite(self._retaking(steps).level_from(checkpoint.start, treatment)):
            again = self._take_again(checkpoint.start, steps, treatment)
        if again is not None:
            session.treatment = treatment
            progress.restore_random_state(session.device)
            return again
        self.release.stop()
        progress.put_back(session.device)
        if symptom is None or symptom in SUSPICIONS:
            return outcome
        return self.treat(symptom, outcome, progress, is_tried=is_tried)

    def count(self, given: Batch, outcome: StepOutcome) -> None:
        """Count what is left out; stop, or go on with all of it, where that is too much."""
        self.left_out.count(given, outcome, self._session.training)
        excess = self.left_out.excess()
        if excess is None or not self._session.diagnoses:
            return
        last = self._session.diagnoses[-1]
        # Of a remedy this says that it was in vain; without it, only whether training goes on.
        goes_on = last.remedy.kind is RemedyKind.NONE and self._settings.goes_on_beyond
        self._session.tell(replace(last, remedy=replace(last.remedy, is_working=goes_on)))
        if not self._settings.goes_on_beyond:
            logger.warning("the doctor leaves too much out: %s", excess)
            raise TrainingHalted(self._session.diagnoses[-1])
        self.left_out.indices.clear()
        self._session.treatment = replace(
            self._session.treatment,
            drops=UNTREATED.drops,
            skips=UNTREATED.skips,
            without=UNTREATED.without,
            min_batch_size=UNTREATED.min_batch_size,
        )
        self._end(f"it leaves too much out: {excess}")

    def _diagnosis(self, finding: Finding, *, noticed_at: int) -> Diagnosis:
        return diagnosis_of(finding, noticed_at=noticed_at, trend=self._trend())

    def _trend(self) -> tuple[TrendPoint, ...]:
        newest = list(self._session.history.steps)[-_NUM_TREND:]
        return tuple(trend_point(recorded.step, recorded.outcome) for recorded in newest)

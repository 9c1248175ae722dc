"""Whether the cases are what they say, examined without the doctor.

Each planted fault must do harm in a plain loop and its twin must learn; each healthy run must stay
sane. Where a case names one of two causes that are easily mixed up, the difference is measured.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from benchmarks.doctor_cases.cases import TOLERANCE, Case, Healthy
from benchmarks.doctor_cases.plain import PlainRun, train_plainly
from benchmarks.doctor_cases.training import begin
from fedrounds.diagnosis.values import Cause

_HARM = 0.02


def objections(case: Case) -> tuple[list[str], str]:
    """Return the objections to a planted case in words, and a line of measurements."""
    twin = train_plainly(case.begin_twin(), is_watched=True)
    spoiled = train_plainly(case.begin(), is_watched=True)
    wrong = []
    if twin.first is not None:
        wrong.append(f"the twin isn't healthy: {twin.first}")
    if twin.score < case.task.least_score:
        wrong.append(f"the twin learns too little: {twin.score:.4f}")
    if spoiled.first is None and spoiled.score > twin.score - _HARM:
        wrong.append(f"no harm is done: {spoiled.score:.4f} beside {twin.score:.4f}")
    if spoiled.first is not None:
        wrong += _misplaced(case, spoiled)
    wrong += _mixed_up(case, twin, spoiled)
    first = "nothing non-finite" if spoiled.first is None else str(tuple(spoiled.first))
    line = (
        f"twin {twin.score:.4f}, spoiled {spoiled.score:.4f}, {first}, "
        f"losses {_brief(spoiled)}, {sum(twin.step_s):.1f} s"
    )
    return wrong, line


def _misplaced(case: Case, spoiled: PlainRun) -> list[str]:
    assert spoiled.first is not None
    step, phase, module, _ = spoiled.first
    expected = case.expected
    wrong = []
    if expected.step is not None and not expected.step <= step <= expected.step + 5:
        wrong.append(f"expected at step {expected.step}, seen at {step}")
    if module == "?" or step != expected.step:
        return wrong
    if expected.phases and phase not in expected.phases and "input" not in expected.phases:
        wrong.append(f"expected in {sorted(expected.phases)}, seen in {phase}")
    return wrong


def _mixed_up(case: Case, twin: PlainRun, spoiled: PlainRun) -> list[str]:
    """Whether the other of two causes heals it just as well, then it must be allowed too.

    Of a rate that is too high: clipping at a norm from before it went wrong, the rate as it is. Of
    a gradient that explodes: a tenth or a hundredth of the rate, not clipped, where
    clipping is what was left out.
    """
    others: list[tuple[str, dict[str, object]]] = []
    if case.expected.causes == {Cause.LEARNING_RATE}:
        norm = statistics.median(twin.grad_norms[: max(5, _went_wrong(twin, spoiled))])
        others = [(f"clipped at {norm:.3g}", {"clip_norm": norm})]
    elif case.expected.causes == {Cause.EXPLODING_GRADIENT} and "clip_norm" in case.fault.overrides:
        others = [
            (f"at 1/{part} of the rate", {"optimizer": _slower(case, part)}) for part in (10, 100)
        ]
    wrong = []
    for what, overrides in others:
        fault = replace(case.fault, overrides={**case.fault.overrides, **overrides})
        other = train_plainly(begin(case.task, seed=case.seed, fault=fault))
        if other.score >= twin.score - TOLERANCE:
            wrong.append(f"{what} it ends at {other.score:.4f} beside {twin.score:.4f}")
    return wrong


def _went_wrong(twin: PlainRun, spoiled: PlainRun) -> int:
    largest = 3 * max(twin.losses)
    bad = (at for at, loss in enumerate(spoiled.losses) if not loss < largest)
    return next(bad, len(spoiled.losses))


def _slower(case: Case, part: int) -> Callable[[nn.Module], Optimizer]:
    def build(model: nn.Module) -> Optimizer:
        optimizer = case.task.optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] /= part
        return optimizer

    return build


def complaints(run: Healthy) -> tuple[list[str], str]:
    """Return the objections to a healthy run in words, and a line of measurements."""
    result = train_plainly(run.begin(), is_watched=True)
    wrong = []
    if result.first is not None:
        wrong.append(f"not healthy: {result.first}")
    if result.score < run.least_score:
        wrong.append(f"ends at {result.score:.4f}, below {run.least_score}")
    return wrong, f"score {result.score:.4f}, losses {_brief(result)}, {sum(result.step_s):.1f} s"


def _brief(run: PlainRun) -> str:
    losses = [loss for loss in run.losses if math.isfinite(loss)] or [math.nan]
    return f"{losses[0]:.3g} .. {max(losses):.3g} .. {losses[-1]:.3g}"

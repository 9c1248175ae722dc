"""The results as tables of a page."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from benchmarks.unseen_doctor_cases.case import REGISTER
from benchmarks.unseen_doctor_cases.judging import (
    HealthyResult,
    PlantedResult,
    bound_holds_on_average,
)

Result = TypeVar("Result", PlantedResult, HealthyResult)

ANSWERS = ("detected", "cause", "phase", "module", "samples", "bound", "twin's", "halted")
METRICS = ("untreated", "skipping", "doctor", "twin")
PLANTED_HEADINGS = ("case", "what is wrong", *ANSWERS, *METRICS, "s")
HEALTHY_HEADINGS = ("case", "what is odd", "plain", "doctor", "changed", "crashed", "diagnoses")


def planted_table(results: Sequence[PlantedResult]) -> str:
    """Return a row for each case: counts over the seeds, means of the metrics."""
    return table(PLANTED_HEADINGS, [_planted_row(group) for group in by_case(results)])


def kinds_table(results: Sequence[PlantedResult]) -> str:
    """Return a row for each kind of fault: shares of runs, cases of a kind together."""
    kinds: dict[str, list[PlantedResult]] = {}
    for group in by_case(results):
        kinds.setdefault(REGISTER.planted[group[0].name].truth.kind, []).extend(group)
    rows = [[kind, *_answers(group)] for kind, group in sorted(kinds.items())]
    return table(("kind", *ANSWERS), rows)


def healthy_table(results: Sequence[HealthyResult]) -> str:
    """Return a row for each healthy case."""
    rows = []
    for group in by_case(results):
        rows.append(
            [
                group[0].name,
                REGISTER.healthy[group[0].name].story,
                _mean(one.plain for one in group),
                _mean(one.doctored for one in group),
                _count(one.is_changed for one in group),
                _count(one.is_crashed for one in group),
                str(sum(one.num_diagnoses for one in group)),
            ]
        )
    return table(HEALTHY_HEADINGS, rows)


def totals(planted: Sequence[PlantedResult], healthy: Sequence[HealthyResult]) -> str:
    """Return the totals as a list of shares of runs."""
    non_finite = [one for one in planted if REGISTER.planted[one.name].truth.becomes_non_finite]
    finite = [one for one in planted if not REGISTER.planted[one.name].truth.becomes_non_finite]
    curable = [one for one in planted if REGISTER.planted[one.name].truth.is_curable]
    groups = by_case(planted)
    lines = [
        ("the plain loop shows the fault", _share(one.is_as_planted for one in planted)),
        ("detected, of what becomes non-finite", _share(one.is_detected for one in non_finite)),
        ("detected, of finite faults", _share(one.is_detected for one in finite)),
        ("cause right", _share(one.is_cause_right for one in planted)),
        ("phase right", _share(one.is_phase_right for one in planted)),
        ("module right", _share(one.is_module_right for one in planted)),
        ("samples exact", _share(one.are_samples_exact for one in planted)),
        ("crashed", _share(one.is_crashed for one in planted)),
        ("halted", _share(one.is_halted for one in planted)),
        ("no worse than untreated and than skipping", _share(one.holds_bound for one in planted)),
        ("the same, of cases by their mean", _share(bound_holds_on_average(one) for one in groups)),
        ("as good as the healthy twin, where curable", _share(one.is_near_twin for one in curable)),
        ("healthy trainings changed", _share(one.is_changed for one in healthy)),
        ("healthy trainings crashed", _share(one.is_crashed for one in healthy)),
        ("healthy trainings with a diagnosis", _share(one.num_diagnoses > 0 for one in healthy)),
    ]
    if planted:
        seconds = sorted(one.seconds for one in planted)
        steps = sorted(one.seconds / one.step_seconds for one in planted)
        middle = len(planted) // 2
        lines.append(
            (
                "time of all diagnoses of a run",
                f"median {seconds[middle]:.2f} s ({steps[middle]:.0f} steps' time), "
                f"longest {seconds[-1]:.1f} s",
            )
        )
    return table(("of runs", "share"), lines)


def by_case(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of each case, in the cases' order."""
    order = [*REGISTER.planted, *REGISTER.healthy]
    ordered = sorted(results, key=lambda one: (order.index(one.name), one.seed))
    return [list(group) for _, group in groupby(ordered, key=lambda one: one.name)]


def _planted_row(group: Sequence[PlantedResult]) -> list[str]:
    return [
        group[0].name,
        REGISTER.planted[group[0].name].story,
        *_answers(group),
        *(_mean(map(metric, group)) for metric in _METRICS),
        f"{statistics.fmean(one.seconds for one in group):.1f}",
    ]


def _answers(group: Sequence[PlantedResult]) -> list[str]:
    return [
        _count(one.is_detected for one in group),
        _count(one.is_cause_right for one in group),
        _count(one.is_phase_right for one in group),
        _count(one.is_module_right for one in group),
        _count(one.are_samples_exact for one in group),
        _count(one.holds_bound for one in group),
        _count(one.is_near_twin for one in group),
        _count(one.is_halted for one in group),
    ]


_METRICS: tuple[Callable[[PlantedResult], float], ...] = (
    lambda one: one.untreated,
    lambda one: one.skipped,
    lambda one: one.doctored,
    lambda one: one.twin,
)


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values):.3f}"


def _count(answers: Iterable[bool | None]) -> str:
    known = [answer for answer in answers if answer is not None]
    return f"{sum(known)}/{len(known)}" if known else "-"


def _share(answers: Iterable[bool | None]) -> str:
    known = [answer for answer in answers if answer is not None]
    return f"{sum(known)} of {len(known)} ({sum(known) / len(known):.1%})" if known else "-"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

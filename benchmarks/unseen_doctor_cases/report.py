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
                _mean(result.plain for result in group),
                _mean(result.doctored for result in group),
                _count(result.is_changed for result in group),
                _count(result.is_crashed for result in group),
                str(sum(result.num_diagnoses for result in group)),
            ]
        )
    return table(HEALTHY_HEADINGS, rows)


def totals(planted: Sequence[PlantedResult], healthy: Sequence[HealthyResult]) -> str:
    """Return the totals as a list of shares of runs."""
    non_finite = [
        result for result in planted if REGISTER.planted[result.name].truth.becomes_non_finite
    ]
    finite = [
        result for result in planted if not REGISTER.planted[result.name].truth.becomes_non_finite
    ]
    curable = [result for result in planted if REGISTER.planted[result.name].truth.is_curable]
    groups = by_case(planted)
    lines = [
        ("the plain loop shows the fault", _share(result.is_as_planted for result in planted)),
        (
            "detected, of what becomes non-finite",
            _share(result.is_detected for result in non_finite),
        ),
        ("detected, of finite faults", _share(result.is_detected for result in finite)),
        ("cause right", _share(result.is_cause_right for result in planted)),
        ("phase right", _share(result.is_phase_right for result in planted)),
        ("module right", _share(result.is_module_right for result in planted)),
        ("samples exact", _share(result.are_samples_exact for result in planted)),
        ("crashed", _share(result.is_crashed for result in planted)),
        ("halted", _share(result.is_halted for result in planted)),
        (
            "no worse than untreated and than skipping",
            _share(result.holds_bound for result in planted),
        ),
        (
            "the same, of cases by their mean",
            _share(bound_holds_on_average(group) for group in groups),
        ),
        (
            "as good as the healthy twin, where curable",
            _share(result.is_near_twin for result in curable),
        ),
        ("healthy trainings changed", _share(result.is_changed for result in healthy)),
        ("healthy trainings crashed", _share(result.is_crashed for result in healthy)),
        (
            "healthy trainings with a diagnosis",
            _share(result.num_diagnoses > 0 for result in healthy),
        ),
    ]
    if planted:
        seconds = sorted(result.seconds for result in planted)
        steps = sorted(result.seconds / result.step_seconds for result in planted)
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
    ordered = sorted(results, key=lambda result: (order.index(result.name), result.seed))
    return [list(group) for _, group in groupby(ordered, key=lambda result: result.name)]


def _planted_row(group: Sequence[PlantedResult]) -> list[str]:
    return [
        group[0].name,
        REGISTER.planted[group[0].name].story,
        *_answers(group),
        *(_mean(map(metric, group)) for metric in _METRICS),
        f"{statistics.fmean(result.seconds for result in group):.1f}",
    ]


def _answers(group: Sequence[PlantedResult]) -> list[str]:
    return [
        _count(result.is_detected for result in group),
        _count(result.is_cause_right for result in group),
        _count(result.is_phase_right for result in group),
        _count(result.is_module_right for result in group),
        _count(result.are_samples_exact for result in group),
        _count(result.holds_bound for result in group),
        _count(result.is_near_twin for result in group),
        _count(result.is_halted for result in group),
    ]


_METRICS: tuple[Callable[[PlantedResult], float], ...] = (
    lambda result: result.untreated,
    lambda result: result.skipped,
    lambda result: result.doctored,
    lambda result: result.twin,
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

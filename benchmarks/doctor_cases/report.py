"""The results as Markdown, for docs/doctor.md."""

import math
import statistics
from collections.abc import Callable, Iterable

from benchmarks.doctor_cases.cases import Outcome
from benchmarks.doctor_cases.judge import HealthyJudgement, Judgement
from benchmarks.doctor_cases.overhead import Overhead
from fedrounds.diagnosis.values import Cause


def planted_table(judged: list[Judgement]) -> str:
    """Return what was found over all cases, beside what is aimed at."""
    data_cases = [one for one in judged if one.are_samples_right is not None]
    curable = [one for one in judged if one.case.expected.outcome is Outcome.CURED]
    halting = [one for one in judged if one.case.expected.outcome is Outcome.HALTED]
    placed = [
        one.is_phase_right is not False and one.is_module_right is not False
        for one in judged
        if one.is_phase_right is not None or one.is_module_right is not None
    ]
    rows: list[tuple[str, Iterable[bool], str]] = [
        ("detected", [one.is_detected for one in judged], "100 %"),
        ("cause named rightly", [one.is_cause_right for one in judged], "95 %"),
        ("phase and module rightly, where there is one", placed, "90 %"),
        ("step rightly, where there is one", _known(one.is_step_right for one in judged), ""),
        (
            "smallest set of samples rightly",
            [one.are_samples_right is True for one in data_cases],
            "95 %",
        ),
        (
            "cured, within 0.5 points of the healthy twin",
            [one.is_end_right for one in curable],
            "100 %",
        ),
        ("halted where no cure is the client's to make", [one.is_end_right for one in halting], ""),
    ]
    lines = ["| planted faults | of | | aim |", "| --- | --- | --- | --- |"]
    for name, right, aim in rows:
        values = list(right)
        share = f"{100 * sum(values) / len(values):.1f} %" if values else ""
        lines.append(f"| {name} | {sum(values)} of {len(values)} | {share} | {aim} |")
    return "\n".join(lines)


def _known(values: Iterable[bool | None]) -> list[bool]:
    return [value for value in values if value is not None]


def cause_table(judged: list[Judgement]) -> str:
    """Return a line for each cause, with the baselines beside the doctor."""
    lines = [
        "| planted cause | cases | cause right | cured (or halted) | halve the rate "
        "| skip the batch | diagnosis, in steps: median | longest | median for SimpleCNN |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cause in Cause:
        mine = [one for one in judged if _planted(one) is cause]
        if not mine:
            continue
        spent = [steps for one in mine for _, steps in one.in_steps]
        lines.append(
            f"| {cause} | {len(mine)} | {sum(one.is_cause_right for one in mine)} "
            f"| {sum(one.is_end_right for one in mine)} "
            f"| {_share(mine, lambda one: one.halved)} | {_share(mine, lambda one: one.skipped)} "
            f"| {statistics.median(spent) if spent else math.nan:.0f} "
            f"| {max(spent, default=math.nan):.0f} | {_median_for('SimpleCNN', mine)} |"
        )
    lines.append(
        f"| all | {len(judged)} | {sum(one.is_cause_right for one in judged)} "
        f"| {sum(one.is_end_right for one in judged)} "
        f"| {_share(judged, lambda one: one.halved)} "
        f"| {_share(judged, lambda one: one.skipped)} | | | |"
    )
    return "\n".join(lines)


def _median_for(architecture: str, judged: list[Judgement]) -> str:
    spent = [
        steps
        for one in judged
        if one.case.task.architecture == architecture
        for _, steps in one.in_steps
    ]
    return f"{statistics.median(spent):.0f}" if spent else ""


def _planted(one: Judgement) -> Cause:
    """The cause a case stands under: the first of those that are right, as Cause lists them."""
    return next(cause for cause in Cause if cause in one.case.expected.causes)


def _share(judged: list[Judgement], of: Callable[[Judgement], bool | None]) -> str:
    known = _known(of(one) for one in judged)
    return f"{sum(known)} of {len(known)}" if known else ""


def healthy_table(judged: list[HealthyJudgement]) -> str:
    """Return the false alarms, and whether the doctor changed what it only watched."""
    alarms = sum(bool(one.treated.diagnoses or one.treated.is_halted) for one in judged)
    errors = sum(bool(one.treated.error) for one in judged)
    unchanged = sum(one.is_unchanged for one in judged)
    return "\n".join(
        [
            "| healthy runs | of | aim |",
            "| --- | --- | --- |",
            f"| false alarms | {alarms} of {len(judged)} | 0 |",
            f"| ended by an error of the doctor's | {errors} of {len(judged)} | 0 |",
            f"| weights those of a plain loop, bit for bit | {unchanged} of {len(judged)} | all |",
        ]
    )


def overhead_table(measured: list[Overhead]) -> str:
    """Return the ratios to a bare loop, and what is added in microseconds a step."""
    lines = [
        "| overhead | bare step (us) | armed / bare | unarmed / bare | anomaly mode / bare "
        "| armed adds (us) | unarmed adds (us) | armed less unarmed (us) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.name} | {one.bare_us:.0f} | {_ratio(one, 'armed')} | {_ratio(one, 'unarmed')} "
        f"| {_ratio(one, 'anomaly')} | {_added(one, 'armed')} | {_added(one, 'unarmed')} "
        f"| {one.over_us['armed'][0] - one.over_us['unarmed'][0]:.0f} |"
        for one in measured
    ]
    return "\n".join(lines)


def _ratio(one: Overhead, way: str) -> str:
    middle, low, high = one.ratios[way]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _added(one: Overhead, way: str) -> str:
    middle, low, high = one.over_us[way]
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def wrong_list(judged: list[Judgement] | list[HealthyJudgement]) -> str:
    """Return each case that went wrong, with what was expected and what came."""
    lines = []
    for one in judged:
        if one.wrong:
            name = one.case.name if isinstance(one, Judgement) else one.run.name
            lines.append(f"- {name}: {'; '.join(one.wrong)}")
    return "\n".join(lines) or "- none"

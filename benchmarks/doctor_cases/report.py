"""The results as Markdown, for docs/doctor.md."""

import math
import statistics
from collections.abc import Callable, Iterable

from benchmarks.doctor_cases.cases import Outcome
from benchmarks.doctor_cases.judge import HealthyJudgement, Judgement
from benchmarks.doctor_cases.overhead import Overhead
from fedrounds.diagnosis.values import Cause


def planted_table(judged: list[Judgement]) -> str:
    """Return the totals over all cases, beside the aims."""
    data_cases = [judgement for judgement in judged if judgement.are_samples_right is not None]
    curable = [
        judgement for judgement in judged if judgement.case.expected.outcome is Outcome.CURED
    ]
    halting = [
        judgement for judgement in judged if judgement.case.expected.outcome is Outcome.HALTED
    ]
    placed = [
        judgement.is_phase_right is not False and judgement.is_module_right is not False
        for judgement in judged
        if judgement.is_phase_right is not None or judgement.is_module_right is not None
    ]
    rows: list[tuple[str, Iterable[bool], str]] = [
        ("detected", [judgement.is_detected for judgement in judged], "100 %"),
        ("cause named rightly", [judgement.is_cause_right for judgement in judged], "95 %"),
        ("phase and module rightly, where there is one", placed, "90 %"),
        (
            "step rightly, where there is one",
            _known(judgement.is_step_right for judgement in judged),
            "",
        ),
        (
            "smallest set of samples rightly",
            [judgement.are_samples_right is True for judgement in data_cases],
            "95 %",
        ),
        (
            "cured, within 0.5 points of the healthy twin",
            [judgement.is_end_right for judgement in curable],
            "100 %",
        ),
        (
            "halted where no cure is the client's to make",
            [judgement.is_end_right for judgement in halting],
            "",
        ),
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
        mine = [judgement for judgement in judged if _planted(judgement) is cause]
        if not mine:
            continue
        spent = [steps for judgement in mine for _, steps in judgement.in_steps]
        lines.append(
            f"| {cause} | {len(mine)} | {sum(judgement.is_cause_right for judgement in mine)} "
            f"| {sum(judgement.is_end_right for judgement in mine)} "
            f"| {_share(mine, lambda judgement: judgement.halved)} "
            f"| {_share(mine, lambda judgement: judgement.skipped)} "
            f"| {statistics.median(spent) if spent else math.nan:.0f} "
            f"| {max(spent, default=math.nan):.0f} | {_median_for('SimpleCNN', mine)} |"
        )
    lines.append(
        f"| all | {len(judged)} | {sum(judgement.is_cause_right for judgement in judged)} "
        f"| {sum(judgement.is_end_right for judgement in judged)} "
        f"| {_share(judged, lambda judgement: judgement.halved)} "
        f"| {_share(judged, lambda judgement: judgement.skipped)} | | | |"
    )
    return "\n".join(lines)


def _median_for(architecture: str, judged: list[Judgement]) -> str:
    spent = [
        steps
        for judgement in judged
        if judgement.case.task.architecture == architecture
        for _, steps in judgement.in_steps
    ]
    return f"{statistics.median(spent):.0f}" if spent else ""


def _planted(judgement: Judgement) -> Cause:
    """The cause a case stands under: the first of those that are right, as Cause lists them."""
    return next(cause for cause in Cause if cause in judgement.case.expected.causes)


def _share(judged: list[Judgement], of: Callable[[Judgement], bool | None]) -> str:
    known = _known(of(judgement) for judgement in judged)
    return f"{sum(known)} of {len(known)}" if known else ""


def healthy_table(judged: list[HealthyJudgement]) -> str:
    """Return the false alarms, and whether the doctor changed what it only watched."""
    alarms = sum(
        bool(judgement.treated.diagnoses or judgement.treated.is_halted) for judgement in judged
    )
    errors = sum(bool(judgement.treated.error) for judgement in judged)
    unchanged = sum(judgement.is_unchanged for judgement in judged)
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
        f"| {overhead.name} | {overhead.bare_us:.0f} | {_ratio(overhead, 'armed')} "
        f"| {_ratio(overhead, 'unarmed')} | {_ratio(overhead, 'anomaly')} "
        f"| {_added(overhead, 'armed')} | {_added(overhead, 'unarmed')} "
        f"| {overhead.over_us['armed'][0] - overhead.over_us['unarmed'][0]:.0f} |"
        for overhead in measured
    ]
    return "\n".join(lines)


def _ratio(overhead: Overhead, way: str) -> str:
    middle, low, high = overhead.ratios[way]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _added(overhead: Overhead, way: str) -> str:
    middle, low, high = overhead.over_us[way]
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def wrong_list(judged: list[Judgement] | list[HealthyJudgement]) -> str:
    """Return each case that went wrong, with what was expected and what came."""
    lines = []
    for judgement in judged:
        if judgement.wrong:
            name = judgement.case.name if isinstance(judgement, Judgement) else judgement.run.name
            lines.append(f"- {name}: {'; '.join(judgement.wrong)}")
    return "\n".join(lines) or "- none"

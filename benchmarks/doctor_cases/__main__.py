"""Planted faults, healthy runs and the overhead: how good the doctor is.

    python -m benchmarks.doctor_cases [--cases planted,healthy,overhead] [--only NAME] [--write]
    python -m benchmarks.doctor_cases --draw 1          other weights, orders, places, strengths
    python -m benchmarks.doctor_cases --check [--cases planted,healthy] [--only NAME]

`--check` examines the cases themselves, without the doctor: each planted fault must do harm in a
plain loop, and each healthy run must stay sane. The trainings run in one thread.
"""

import argparse
import itertools
import sys
import warnings

import torch

from benchmarks.doctor_cases.cases import Case, Healthy
from benchmarks.doctor_cases.examination import complaints, objections
from benchmarks.doctor_cases.healthy import healthy_runs
from benchmarks.doctor_cases.planted import planted_cases
from benchmarks.doctor_cases.training import DRAW
from benchmarks.federation import machine_line, write_section

_KINDS = ("planted", "healthy", "overhead")


def main() -> int:
    """Run what is asked for and print it; 1 if `--check` finds a case that isn't what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(_KINDS), help=f"some of {', '.join(_KINDS)}")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument(
        "--draw",
        type=int,
        default=0,
        help="another draw of weights, orders, places and strengths than the frozen one; a case "
        "that isn't what it says in that draw doesn't count",
    )
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/doctor.md")
    arguments = parser.parse_args()
    kinds = arguments.cases.split(",")
    if not set(kinds) <= set(_KINDS):
        parser.error(f"--cases takes some of {', '.join(_KINDS)}, not {arguments.cases}")
    torch.set_num_threads(1)
    DRAW.set(arguments.draw)
    # Some cases are meant to be odd: torch warns of a standard deviation of one number.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|benchmarks")
    planted = planted_cases() if "planted" in kinds else []
    healthy = healthy_runs() if "healthy" in kinds else []
    planted = [case for case in planted if arguments.only in case.name]
    healthy = [run for run in healthy if arguments.only in run.name]
    if arguments.check:
        return _check(planted, healthy)
    command = " ".join(["python -m benchmarks.doctor_cases", *_without_write(sys.argv[1:])])
    head = f"{machine_line()}, torch {torch.__version__}; `{command}`"
    sections = {}
    if planted or healthy:
        sections["doctor_cases"] = _judge(
            planted, healthy, with_baselines=not arguments.no_baselines
        )
    if "overhead" in kinds:
        # The cases can be examined without the doctor, so it is imported only here.
        from benchmarks.doctor_cases import overhead, report  # noqa: PLC0415

        sections["doctor_overhead"] = report.overhead_table(overhead.measure_overhead())
    for name, table in sections.items():
        text = f"{head}\n\n{table}"
        print(text)
        if arguments.write:
            write_section(name, text, page="doctor.md")
    return 0


def _without_write(words: list[str]) -> list[str]:
    return [word for word in words if word != "--write"]


def _check(planted: list[Case], healthy: list[Healthy]) -> int:
    examined = itertools.chain(
        ((case.name, objections(case)) for case in planted),
        ((run.name, complaints(run)) for run in healthy),
    )
    num_wrong = 0
    for name, (wrong, line) in examined:
        num_wrong += bool(wrong)
        print(f"{'WRONG' if wrong else 'ok'} {name}: {line}", *wrong, sep="\n    ", flush=True)
    print(f"{num_wrong} of {len(planted) + len(healthy)} aren't what they say")
    return 1 if num_wrong else 0


def _judge(planted: list[Case], healthy: list[Healthy], *, with_baselines: bool) -> str:
    # As above.
    from benchmarks.doctor_cases import judge, report  # noqa: PLC0415

    sections = []
    if planted:
        judged = []
        for case in planted:
            judgement = judge.judge(case, with_baselines=with_baselines)
            if judgement.wrong and DRAW.get() and objections(case)[0]:
                print(f"void {case.name}", flush=True)
                continue
            judged.append(judgement)
            _say(case.name, judgement.wrong, judgement.took_s)
        sections += [
            report.planted_table(judged),
            report.cause_table(judged),
            f"Planted cases that went wrong:\n\n{report.wrong_list(judged)}",
        ]
    if healthy:
        watched = []
        for run in healthy:
            seen = judge.judge_healthy(run)
            if seen.wrong and DRAW.get() and complaints(run)[0]:
                print(f"void {run.name}", flush=True)
                continue
            watched.append(seen)
            _say(run.name, seen.wrong, seen.took_s)
        sections += [
            report.healthy_table(watched),
            f"Healthy runs that went wrong:\n\n{report.wrong_list(watched)}",
        ]
    return "\n\n".join(sections)


def _say(name: str, wrong: tuple[str, ...], took_s: float) -> None:
    print(f"{'WRONG' if wrong else 'ok'} {name} {took_s:.1f} s", *wrong, sep="\n    ", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Run the unseen cases and, on demand, write their table.

python -m benchmarks.unseen_doctor_cases [--cases PART,...] [--seeds 0,1,2] [--write]
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.federation import machine_line, write_section
from benchmarks.unseen_doctor_cases.case import REGISTER
from benchmarks.unseen_doctor_cases.judging import HealthyResult, PlantedResult
from benchmarks.unseen_doctor_cases.processes import judge_all
from benchmarks.unseen_doctor_cases.report import (
    healthy_table,
    kinds_table,
    planted_table,
    totals,
)

PAGE = "doctor_unseen.md"


def load_results(path: Path | None) -> list[PlantedResult | HealthyResult]:
    """Return the results that a run before this kept, none where there is no file."""
    if path is None or not path.exists():
        return []
    kept = [json.loads(text) for text in path.read_text().splitlines()]
    return [
        (PlantedResult if values["name"] in REGISTER.planted else HealthyResult)(**values)
        for values in kept
    ]


def line(result: PlantedResult | HealthyResult) -> str:
    """Return a result in one line."""
    head = f"{result.name:28} {result.seed}"
    if isinstance(result, HealthyResult):
        changed = "CHANGED" if result.is_changed else "same"
        crashed = " CRASHED" if result.is_crashed else ""
        return (
            f"{head} {changed}{crashed} {result.doctored:.3f} plain {result.plain:.3f} "
            f"x{result.slowdown:.1f} | {result.words}"
        )
    answers = {
        "planted": result.is_as_planted,
        "det": result.is_detected,
        "cause": result.is_cause_right,
        "phase": result.is_phase_right,
        "mod": result.is_module_right,
        "smp": result.are_samples_exact,
        "bound": result.holds_bound,
        "twin": result.is_near_twin,
    }
    marks = {True: "+", False: "X", None: "-"}
    marked = " ".join(f"{name}{marks[answer]}" for name, answer in answers.items())
    ends = " CRASHED" * result.is_crashed + " HALTED" * result.is_halted
    return (
        f"{head} {marked}{ends} | plain {result.untreated:.3f} skip {result.skipped:.3f} "
        f"doctor {result.doctored:.3f} twin {result.twin:.3f} {result.seconds:.1f} s | "
        f"{result.words}"
    )


def main() -> int:
    """Run what the command line names; 0 where no case crashed and no healthy one was changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="parts of cases' names, by comma; all if empty")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, by comma")
    parser.add_argument(
        "--processes", type=int, default=2, help="cases run at the same time; 0 reports the kept"
    )
    parser.add_argument("--keep", type=Path, help="keep results in this file; take up what it has")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE}")
    options = parser.parse_args()
    parts = options.cases.split(",")
    names = [
        name
        for name in [*REGISTER.planted, *REGISTER.healthy]
        if any(part in name for part in parts)
    ]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = [(name, seed) for seed in seeds for name in names]
    results = [
        result for result in load_results(options.keep) if (result.name, result.seed) in wanted
    ]
    known = {(result.name, result.seed) for result in results}
    left = [run for run in wanted if run not in known]
    num_missing = 0 if options.processes else len(left)
    for result in judge_all(
        left if options.processes else [], num_processes=options.processes or 1
    ):
        print(line(result), flush=True)
        results.append(result)
        if options.keep is not None:
            with options.keep.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    planted = [result for result in results if isinstance(result, PlantedResult)]
    healthy = [result for result in results if isinstance(result, HealthyResult)]
    print(f"{kinds_table(planted)}\n\n{totals(planted, healthy)}")
    if options.write:
        command = " ".join(["python -m benchmarks.unseen_doctor_cases", *_arguments(options)])
        num_cases = (
            len({result.name for result in planted}),
            len({result.name for result in healthy}),
        )
        write_section(
            "doctor_unseen",
            f"{machine_line()}, torch {torch.__version__}; `{command}`: {num_cases[0]} planted and "
            f"{num_cases[1]} healthy cases in seeds {options.seeds}; {num_missing} runs missing\n\n"
            f"{totals(planted, healthy)}\n\n"
            f"{kinds_table(planted)}\n\n{planted_table(planted)}\n\n{healthy_table(healthy)}",
            page=PAGE,
        )
        print(f"written to {Path('docs') / PAGE}")
    is_harmless = not any(result.is_crashed for result in results)
    return 0 if is_harmless and not any(result.is_changed for result in healthy) else 1


def _arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments that differ from the defaults, but for --write itself."""
    arguments = []
    if options.cases:
        arguments += ["--cases", options.cases]
    if options.seeds != "0,1,2":
        arguments += ["--seeds", options.seeds]
    if options.keep is not None:
        arguments += ["--keep", options.keep.name]
    if not options.processes:
        arguments += ["--processes", "0"]
    return [*arguments, "--write"]


if __name__ == "__main__":
    sys.exit(main())

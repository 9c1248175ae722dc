"""Run the unseen cases and, on demand, write their table.

python -m benchmarks.unseen_doctor_cases [--cases PART,...] [--seeds 0,1,2] [--write]
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import benchmarks.unseen_doctor_cases.cases_finite
import benchmarks.unseen_doctor_cases.cases_healthy
import benchmarks.unseen_doctor_cases.cases_healthy_loops
import benchmarks.unseen_doctor_cases.cases_losses
import benchmarks.unseen_doctor_cases.cases_models
import benchmarks.unseen_doctor_cases.cases_optimizers  # noqa: F401
from benchmarks.federation import machine_line, write_section
from benchmarks.unseen_doctor_cases.case import REGISTER
from benchmarks.unseen_doctor_cases.judging import (
    HealthyResult,
    PlantedResult,
    judge_healthy,
    judge_planted,
)
from benchmarks.unseen_doctor_cases.report import healthy_table, planted_table, totals

PAGE = "doctor_unseen.md"


def judge(name: str, seed: int) -> PlantedResult | HealthyResult:
    """Run one case in one seed, on one thread."""
    torch.set_num_threads(1)
    if name in REGISTER.planted:
        return judge_planted(REGISTER.planted[name], seed=seed)
    return judge_healthy(REGISTER.healthy[name], seed=seed)


def judge_all(
    names: Sequence[str], seeds: Sequence[int], *, num_processes: int
) -> Iterator[PlantedResult | HealthyResult]:
    """Yield the result of each case in each seed as it comes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(judge, name, seed) for name in names for seed in seeds]
        for future in as_completed(futures):
            yield future.result()


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
    told = " ".join(f"{name}{marks[answer]}" for name, answer in answers.items())
    ends = " CRASHED" * result.is_crashed + " HALTED" * result.is_halted
    return (
        f"{head} {told}{ends} | plain {result.untreated:.3f} skip {result.skipped:.3f} "
        f"doctor {result.doctored:.3f} twin {result.twin:.3f} {result.seconds:.1f} s | "
        f"{result.words}"
    )


def main() -> int:
    """Run what the command line names; 0 where no case crashed and no healthy one was changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="parts of cases' names, by comma; all if empty")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, by comma")
    parser.add_argument("--processes", type=int, default=2, help="cases run at the same time")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE}")
    options = parser.parse_args()
    parts = options.cases.split(",")
    names = [
        name
        for name in [*REGISTER.planted, *REGISTER.healthy]
        if any(part in name for part in parts)
    ]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results = []
    for result in judge_all(names, seeds, num_processes=options.processes):
        print(line(result), flush=True)
        results.append(result)
    planted = [one for one in results if isinstance(one, PlantedResult)]
    healthy = [one for one in results if isinstance(one, HealthyResult)]
    print(totals(planted, healthy))
    if options.write:
        command = " ".join(["python -m benchmarks.unseen_doctor_cases", *_arguments(options)])
        num_cases = len({one.name for one in planted}), len({one.name for one in healthy})
        write_section(
            "doctor_unseen",
            f"{machine_line()}, torch {torch.__version__}; `{command}`: {num_cases[0]} planted and "
            f"{num_cases[1]} healthy cases in {len(seeds)} seeds\n\n{totals(planted, healthy)}\n\n"
            f"{planted_table(planted)}\n\n{healthy_table(healthy)}",
            page=PAGE,
        )
        print(f"written to {Path('docs') / PAGE}")
    is_harmless = not any(one.is_crashed for one in results)
    return 0 if is_harmless and not any(one.is_changed for one in healthy) else 1


def _arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments that differ from the defaults, but for --write itself."""
    told = []
    if options.cases:
        told += ["--cases", options.cases]
    if options.seeds != "0,1,2":
        told += ["--seeds", options.seeds]
    return [*told, "--write"]


if __name__ == "__main__":
    sys.exit(main())

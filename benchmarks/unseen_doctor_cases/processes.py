"""Runs cases in processes of their own; to import it is to register every case."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

import benchmarks.unseen_doctor_cases.cases_finite
import benchmarks.unseen_doctor_cases.cases_healthy
import benchmarks.unseen_doctor_cases.cases_healthy_loops
import benchmarks.unseen_doctor_cases.cases_losses
import benchmarks.unseen_doctor_cases.cases_models
import benchmarks.unseen_doctor_cases.cases_optimizers
import benchmarks.unseen_doctor_cases.cases_targets  # noqa: F401
from benchmarks.unseen_doctor_cases.case import REGISTER
from benchmarks.unseen_doctor_cases.judging import (
    HealthyResult,
    PlantedResult,
    judge_healthy,
    judge_planted,
)


def judge(name: str, seed: int) -> PlantedResult | HealthyResult:
    """Run one case in one seed, on one thread."""
    torch.set_num_threads(1)
    if name in REGISTER.planted:
        return judge_planted(REGISTER.planted[name], seed=seed)
    return judge_healthy(REGISTER.healthy[name], seed=seed)


def judge_all(
    runs: Sequence[tuple[str, int]], *, num_processes: int
) -> Iterator[PlantedResult | HealthyResult]:
    """Yield the result of each (case, seed) as it comes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(judge, name, seed) for name, seed in runs]
        for future in as_completed(futures):
            yield future.result()

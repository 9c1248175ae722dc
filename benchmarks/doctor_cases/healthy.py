"""Trainings in which nothing is wrong, though much looks odd: no alarm may sound."""

from benchmarks.doctor_cases import healthy_steps, healthy_tasks
from benchmarks.doctor_cases.cases import Healthy


def healthy_runs() -> list[Healthy]:
    """Return the healthy runs."""
    rows = [
        *healthy_steps.small_batches(),
        *healthy_steps.high_rates(),
        *healthy_steps.few_bits(),
        *healthy_steps.schedules(),
        *healthy_steps.partly_frozen(),
        *healthy_steps.resumed(),
        *healthy_tasks.one_sided_clients(),
        *healthy_tasks.little_data(),
        *healthy_tasks.slow_and_noisy(),
        *healthy_tasks.odd_losses(),
        *healthy_tasks.odd_inputs(),
    ]
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names), sorted(names)
    return [
        Healthy(name=name, task=task, seed=seed, least_score=least_score)
        for seed, (name, task, least_score) in enumerate(rows, start=1000)
    ]

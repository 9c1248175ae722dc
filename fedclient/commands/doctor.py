"""`python -m fedclient doctor`: checks whether this client is ready to join a run."""

from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from fedclient.devices import find_device
from fedclient.preflight import (
    Check,
    FirstSteps,
    Severity,
    inspect_data,
    inspect_first_steps,
    inspect_received_model,
    inspect_trial_step,
    inspect_weights,
    take_first_steps,
)
from fedclient.settings import DoctorCommandSettings
from fedrounds.diagnosis.text import (
    EXPERIMENT_HEADINGS,
    TREND_HEADINGS,
    Rows,
    experiment_rows,
    facts,
    trend_rows,
    verdict,
)
from fedrounds.diagnosis.values import Diagnosis
from fedrounds.errors import InvalidInput
from fedrounds.plugins import naming_task_errors, show_error
from fedrounds.seeds import derive_seed
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.loading import load_examples
from fedrounds.tasks.task import (
    DataRequest,
    Examples,
    Partition,
    Task,
    build_model,
    count_examples,
)
from fedrounds.tensors.codec import load_state_into
from fedrounds.training.determinism import repeatable
from fedrounds.types import TrainingConfig

_NUM_TREND = 4
_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def run(settings: DoctorCommandSettings) -> int:
    """Print the checks; return the exit code."""
    torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    task = find_task(settings.task or "mnist-sample")
    partition = None
    source = "its own data"
    if settings.source == "partition":
        if settings.id >= settings.num_partitions:
            raise InvalidInput(
                f"client {settings.id}: partition {settings.id} of {settings.num_partitions} "
                f"doesn't exist; partitions count from 0 to {settings.num_partitions - 1}. Give "
                f"the run's --num-partitions, such as {settings.id + 1}"
            )
        partition = Partition(
            scheme=settings.partition,
            num_partitions=settings.num_partitions,
            index=settings.id,
            seed=settings.seed,
            parameters=settings.scheme_parameters,
        )
        source = f"share {settings.id} of {settings.num_partitions}, {settings.partition}"
    console = Console()
    console.print(
        Text(f"client {settings.id}, task {task.name}, {source}", style="bold"), soft_wrap=True
    )
    with naming_task_errors(f"task {task.name!r}: load_train"):
        examples = load_examples(
            task, DataRequest(data_root=settings.data_root, partition=partition)
        )
        num_examples = count_examples(task, examples, loaded_by="load_train")
        checks = inspect_data(examples, task)
    diagnosis, failure = None, None
    with repeatable(num_threads=settings.threads):
        if num_examples:
            trial, failure = inspect_trial_step(task, examples, device)
            checks.append(trial)
            if failure is None:
                steps = _inspect_model(settings, task, examples, device, checks)
                diagnosis, failure = steps.diagnosis, steps.error
    console.print(_table(checks))
    if diagnosis is not None:
        _print_diagnosis(console, diagnosis)
    if failure is not None:
        console.print(Text(f"\n{show_error(failure)}"), soft_wrap=True)
    console.print(f"\n{_summary(checks)}", style="bold")
    return 1 if any(check.severity is Severity.ERROR for check in checks) else 0


def _inspect_model(
    settings: DoctorCommandSettings,
    task: Task,
    examples: Examples,
    device: torch.device,
    checks: list[Check],
) -> FirstSteps:
    """Check weights, received model and first steps; adds to `observations`."""
    torch.manual_seed(derive_seed(settings.seed, "init"))
    model = build_model(task)
    if settings.model is not None:
        _load(model, settings.model)
    is_initial = settings.model is None
    checks.append(inspect_weights(model, is_initial=is_initial))
    if not is_initial:
        checks.append(inspect_received_model(model, examples, task, device))
    steps = take_first_steps(
        model,
        examples,
        task,
        training=TrainingConfig(
            batch_size=settings.batch_size,
            optimizer=settings.optimizer,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        ),
        num_steps=settings.steps,
        device=device,
        seed=derive_seed(settings.seed, "batches", client_id=settings.id),
        memory_bytes=settings.doctor_bytes,
        is_initial=is_initial,
    )
    checks.append(inspect_first_steps(steps))
    return steps


def _summary(checks: list[Check]) -> str:
    errors, warnings = (
        ", ".join(check.subject for check in checks if check.severity is severity)
        for severity in (Severity.ERROR, Severity.WARNING)
    )
    if errors:
        return f"Not ready to train: {errors}"
    return f"Ready to train; look at the warnings: {warnings}" if warnings else "Ready to train"


def _load(model: nn.Module, path: Path) -> None:
    try:
        load_state_into(model.state_dict(), path)
    except (InvalidInput, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(
            f"--model {path} can't be loaded: {why}; give a safetensors file of this task's model"
        ) from error


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for check in checks:
        severity = Text(check.severity.value, style=_STYLES[check.severity])
        table.add_row(severity, check.subject, Text(check.result))
    return table


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    console.print(Text(f"\n{verdict(diagnosis)}", style="bold"))
    fact_table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts(diagnosis):
        fact_table.add_row(name, Text(value))
    console.print(fact_table)
    for headings, rows in (
        (EXPERIMENT_HEADINGS, experiment_rows(diagnosis)),
        (TREND_HEADINGS, trend_rows(diagnosis)[-_NUM_TREND:]),
    ):
        if rows:
            console.print()
            console.print(_rows_table(headings, rows))


def _rows_table(headings: tuple[str, ...], rows: Rows) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table

"""`python -m fedclient doctor`: whether this client is fit to join."""

from pathlib import Path

import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from fedclient.devices import find_device
from fedclient.preflight import (
    FirstSteps,
    Mark,
    Observation,
    examine_answers,
    examine_data,
    examine_steps,
    examine_trial,
    examine_weights,
    take_first_steps,
)
from fedclient.settings import ComputeSettings, DataSettings, SharesSettings
from fedrounds.cli import parse
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
from fedrounds.tasks.task import DataRequest, Examples, Partition, Task, build_model
from fedrounds.tensors.codec import load_state_into
from fedrounds.training.determinism import repeatable
from fedrounds.types import OptimizerName, TrainingConfig

_TRAINING = TrainingConfig()
_NUM_TREND = 4
_STYLES = {Mark.WELL: "green", Mark.ODD: "yellow", Mark.BAD: "bold red"}


class CheckupSettings(SharesSettings, ComputeSettings, DataSettings):
    """Examine a client's data, first weights (or a model it was sent) and first steps.

    Exit code 0: it is well; 1: it isn't. Nothing leaves this machine.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedclient doctor")

    id: int = Field(default=0, ge=0, le=2**53, description="this client's number")
    model: Path | None = Field(
        default=None,
        description="safetensors file of a model to examine instead of first weights: one that "
        "the server holds or exported",
    )
    steps: int = Field(default=50, ge=1, description="training steps that are tried")
    batch_size: int = Field(default=_TRAINING.batch_size, ge=1, description="examples a step")
    optimizer: OptimizerName = Field(default="sgd", description="as the run's")
    lr: float = Field(default=_TRAINING.lr, gt=0, description="the run's learning rate")
    momentum: float = Field(default=_TRAINING.momentum, ge=0, lt=1, description="the run's")
    weight_decay: float = Field(default=_TRAINING.weight_decay, ge=0, description="the run's")
    clip_norm: float | None = Field(
        default=_TRAINING.clip_norm, gt=0, description="largest L2 norm of a gradient"
    )
    doctor_bytes: int = Field(
        default=512 * 2**20, ge=0, description="bytes of states and batches kept to go back to"
    )


def run(argv: list[str]) -> int:
    """Print what is well and what isn't; returns the exit code."""
    settings = parse(CheckupSettings, argv)
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
        examples = task.load_train(DataRequest(data_root=settings.data_root, partition=partition))
        observations = examine_data(examples, task)
    diagnosis, failure = None, None
    with repeatable(num_threads=settings.threads):
        if len(examples):  # type: ignore[arg-type]  # Dataset itself declares no length
            trial, failure = examine_trial(task, examples, device)
            observations.append(trial)
            if failure is None:
                steps = _examine_model(settings, task, examples, device, observations)
                diagnosis, failure = steps.diagnosis, steps.error
    console.print(_table(observations))
    if diagnosis is not None:
        _print_diagnosis(console, diagnosis)
    if failure is not None:
        console.print(Text(f"\n{show_error(failure)}"), soft_wrap=True)
    console.print(f"\n{_summary(observations)}", style="bold")
    return 1 if any(one.mark is Mark.BAD for one in observations) else 0


def _examine_model(
    settings: CheckupSettings,
    task: Task,
    examples: Examples,
    device: torch.device,
    observations: list[Observation],
) -> FirstSteps:
    """Examine weights, answers and first steps; adds to `observations`."""
    torch.manual_seed(derive_seed(settings.seed, "init"))
    model = build_model(task)
    if settings.model is not None:
        _load(model, settings.model)
    is_initial = settings.model is None
    observations.append(examine_weights(model, is_initial=is_initial))
    if not is_initial:
        observations.append(examine_answers(model, examples, task, device))
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
    observations.append(examine_steps(steps))
    return steps


def _summary(observations: list[Observation]) -> str:
    bad, odd = (
        ", ".join(one.what for one in observations if one.mark is mark)
        for mark in (Mark.BAD, Mark.ODD)
    )
    if bad:
        return f"Not well: {bad}"
    return f"It can be trained; look at what is odd: {odd}" if odd else "It is well"


def _load(model: nn.Module, path: Path) -> None:
    try:
        load_state_into(model.state_dict(), path)
    except (InvalidInput, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(
            f"--model {path} can't be examined: {why}; give a safetensors file of this task's model"
        ) from error


def _table(observations: list[Observation]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in observations:
        table.add_row(Text(one.mark.value, style=_STYLES[one.mark]), one.what, Text(one.found))
    return table


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    console.print(Text(f"\n{verdict(diagnosis)}", style="bold"))
    known = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts(diagnosis):
        known.add_row(name, Text(value))
    console.print(known)
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

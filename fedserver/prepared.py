"""Task, strategy and evaluator of the settings, built before a run begins or goes on."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch

from fedrounds.data import validate_scheme
from fedrounds.plugins import naming_task_errors
from fedrounds.strategies.client_algorithms import validate_model
from fedrounds.strategies.components import Strategy
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import Task, build_model, kinds_of
from fedrounds.tensors.compression import Shape, compressed_shapes
from fedrounds.tensors.entries import running_variances, tied_entries, validate_first_values
from fedrounds.training.metrics import measurement_sizes
from fedrounds.types import Encoding, EntryKind
from fedserver.models.evaluation import Evaluator
from fedserver.preflight import validate_compression, validate_goals, validate_strategy
from fedserver.run_context import strategy_of
from fedserver.run_settings import run_compression
from fedserver.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The task, strategy and evaluator that settings name, and facts of the task's model."""

    task: Task
    strategy: Strategy
    kinds: Mapping[str, EntryKind]
    ties: Mapping[str, str]
    variances: Set[str]
    modules: Set[str]
    measurement_sizes: Mapping[str, int]
    evaluator: Evaluator


def prepare(settings: ServerSettings) -> Prepared:
    """Build what the settings name, and refuse what can't work.

    Raises:
        InvalidInput: a setting can't be what it is.
        OwnCodeFailed: the task's own code raised an error.
    """
    task = find_task(settings.task)
    strategy = strategy_of(settings)
    validate_strategy(settings, strategy)
    validate_scheme(settings.partition, settings.partitioning.parameters)
    model = build_model(task)
    kinds = kinds_of(task, model)
    validate_first_values(model, kinds, task=task.name)
    validate_model(strategy.client_algorithm, model, kinds)
    compressed_bytes, model_bytes = _sizes(settings, model, kinds)
    validate_compression(settings, compressed_bytes=compressed_bytes, model_bytes=model_bytes)
    evaluator = Evaluator(task, model, data_root=settings.data_root)
    evaluator.try_batch()
    validate_goals(settings.with_goal_of(task.best_by), evaluator.measured_names, task=task.name)
    return Prepared(
        task=task,
        strategy=strategy,
        kinds=kinds,
        ties=tied_entries(model),
        variances=running_variances(model),
        modules={name for name, _ in model.named_modules()},
        measurement_sizes=_measurement_sizes(task) if settings.evaluate_on_clients else {},
        evaluator=evaluator,
    )


def _measurement_sizes(task: Task) -> Mapping[str, int]:
    with naming_task_errors(f"task {task.name!r}: making its metrics"):
        return measurement_sizes(task.metrics)


def _sizes(
    settings: ServerSettings, model: torch.nn.Module, kinds: Mapping[str, EntryKind]
) -> tuple[int, int]:
    """Return the bytes of the model's parameters, as clients compress them and as they are."""
    shapes: dict[str, Shape] = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if kinds[name] is EntryKind.PARAMETER
    }
    compression = run_compression(settings)
    is_compressed = compression.encoding is not Encoding.STATE_DICT
    sent = compressed_shapes(shapes, compression) if is_compressed else shapes
    return _num_bytes(sent), _num_bytes(shapes)


def _num_bytes(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())

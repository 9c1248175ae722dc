"""Settings that can't work are refused here, before a run begins or goes on with them.

What a single setting may be, and what two of them may be together, is in fedserver.settings; here
they meet the task, its model, the strategy and the folders.
"""

import math
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from fedrounds.data import validate_scheme
from fedrounds.errors import InvalidInput, StorageDamaged
from fedrounds.strategies.client_algorithms import validate_model
from fedrounds.strategies.components import Strategy
from fedrounds.strategies.registry import find_strategy
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import Task, build_model, kinds_of
from fedrounds.tensors.compression import Shape, compressed_shapes
from fedrounds.tensors.entries import tied_entries, validate_first_values
from fedrounds.types import Encoding, EntryKind
from fedserver.models.evaluation import Evaluator
from fedserver.run_settings import run_compression
from fedserver.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the settings name, examined before a run begins or goes on with it."""

    task: Task
    strategy: Strategy
    kinds: Mapping[str, EntryKind]
    ties: Mapping[str, str]
    modules: Set[str]
    evaluator: Evaluator


def prepare(settings: ServerSettings) -> Prepared:
    """Return what the settings name.

    Raises:
        InvalidInput: a setting can't be what it is.
        OwnCodeFailed: the task's own code raised an error.
    """
    task = find_task(settings.task)
    strategy = _validate_strategy(settings)
    validate_scheme(settings.partition, settings.partitioning.parameters)
    model = build_model(task)
    kinds = kinds_of(task, model)
    validate_first_values(model, kinds, task=task.name)
    validate_model(strategy.client_algorithm, model, kinds)
    _validate_compression(settings, model, kinds)
    evaluator = Evaluator(task, model, data_root=settings.data_root)
    evaluator.try_batch()
    return Prepared(
        task=task,
        strategy=strategy,
        kinds=kinds,
        ties=tied_entries(model),
        modules={name for name, _ in model.named_modules()},
        evaluator=evaluator,
    )


def validate_export(path: Path) -> None:
    """Refuse a place for the final model that can't be written to, before days of training."""
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--export {path}: there is no such folder; make it first")
    for one in (path, best_beside(path)):
        if one.is_dir():
            raise InvalidInput(
                f"--export {path}: {one} is a folder; name a file, such as "
                f"{path / 'model.safetensors'}"
            )
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InvalidInput(
            f"--export {path}: nothing can be written in its folder ({error.strerror}); "
            "choose another one"
        ) from error


def best_beside(last: Path) -> Path:
    """Return where the best model goes if it isn't the last."""
    return last.with_stem(f"{last.stem}-best")


def _validate_strategy(settings: ServerSettings) -> Strategy:
    strategy = find_strategy(settings.run_settings())
    if strategy.buffer_size:
        _validate_asynchrony(settings, strategy)
        return strategy
    if settings.concurrency or settings.max_staleness is not None:
        raise InvalidInput(
            "--concurrency and --max-staleness are of asynchronous strategies alone; add "
            "--strategy fedbuff, or leave them out"
        )
    if settings.updates_needed < strategy.min_updates:
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            f"but {settings.updates_needed} are enough to close one; raise --min-updates (or "
            "--min-clients)"
        )
    if strategy.min_updates > 1 and settings.straggler_work == "none":
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            "and --straggler-work none leaves clients out after a round's have been chosen; leave "
            "it away, or take another strategy"
        )
    return strategy


def _validate_asynchrony(settings: ServerSettings, strategy: Strategy) -> None:
    for flag, is_given, instead in (
        ("--clients-per-round", settings.clients_per_round, "say how many work with --concurrency"),
        ("--min-updates", settings.min_updates, "say how many it is with buffer_size"),
        ("--require-all", settings.require_all, "every order's update is waited for anyway"),
        ("--stragglers", settings.stragglers, "its slow clients are slow by themselves"),
        ("--round-deadline", settings.round_deadline is not None, "nobody waits for a slow client"),
    ):
        if is_given:
            raise InvalidInput(
                f"strategy {strategy.name} is asynchronous, a round is {strategy.buffer_size} "
                f"updates whoever they come from: leave out {flag}, {instead}"
            )


def _validate_compression(
    settings: ServerSettings, model: torch.nn.Module, kinds: Mapping[str, EntryKind]
) -> None:
    """Refuse what would make updates larger: more than the model is never admitted."""
    compression = run_compression(settings)
    if compression.encoding is Encoding.STATE_DICT:
        return
    shapes: dict[str, Shape] = {
        name: (one.dtype, tuple(one.shape))
        for name, one in model.state_dict().items()
        if kinds[name] is EntryKind.PARAMETER
    }
    compressed_bytes, model_bytes = (
        sum(math.prod(shape) * dtype.itemsize for dtype, shape in one.values())
        for one in (compressed_shapes(shapes, compression), shapes)
    )
    if compressed_bytes >= model_bytes:
        raise InvalidInput(
            f"--compression {settings.compression} makes {compressed_bytes} bytes of the "
            f"{model_bytes} of this model's parameters; choose another one, or none"
        )


def expect_database(state_dir: Path) -> None:
    """Refuse a folder with models or updates of a run whose database is gone.

    Raises:
        StorageDamaged: it is.
    """
    database = state_dir / "federation.sqlite"
    folders = [state_dir / name for name in ("models", "spool")]
    if not database.exists() and any(
        folder.is_dir() and any(folder.iterdir()) for folder in folders
    ):
        raise StorageDamaged(
            f"{database} is gone, but what a run has left is there: put the database back, or "
            "start with another --state-dir"
        )

"""Refuses settings that can't work, before a run begins or goes on with them.

All refusals of settings stand here, but two kinds. What a single setting may be is declared in
fedserver.settings. What a strategy, a task or its model asks for by itself (fednova's optimizer,
fedbn's normalisation layers) is refused by fedrounds.strategies and fedrounds.tasks.

Nothing here imports torch: most refusals come before that.
"""

import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrounds.errors import InvalidInput, StorageDamaged, WrongSettings
from fedrounds.types import MAX_INT32
from fedserver.quorum import cohort_size, updates_needed

if TYPE_CHECKING:
    # Settings are validated here.
    from fedrounds.strategies.components import Strategy
    from fedserver.settings import ServerSettings


def validate_together(settings: "ServerSettings") -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: two of them do.
    """
    needed = updates_needed(settings)
    if settings.clients_per_round and settings.clients_per_round < needed:
        raise ValueError(
            f"--clients-per-round {settings.clients_per_round} is less than the {needed} updates "
            "a round needs; lower --min-updates"
        )
    if settings.cohort != "uniform" and not (settings.clients_per_round or settings.concurrency):
        raise ValueError(
            f"--cohort {settings.cohort} has nothing to choose where a round asks everybody; say "
            "how many it asks with --clients-per-round (of fedbuff: --concurrency)"
        )
    if settings.cohort_candidates and settings.cohort != "power-of-choice":
        raise ValueError("--cohort-candidates is of --cohort power-of-choice alone; leave it out")
    if 0 < settings.cohort_candidates < cohort_size(settings):
        raise ValueError(
            f"--cohort-candidates {settings.cohort_candidates} is less than the "
            f"{cohort_size(settings)} clients that a round asks; there must be some to choose from"
        )
    if settings.over_select > 1 and not settings.clients_per_round:
        raise ValueError(
            f"--over-select {settings.over_select:g} asks more clients than a round is to have; "
            "say how many those are with --clients-per-round"
        )
    if settings.over_select > 1 and settings.require_all:
        raise ValueError(
            "--over-select leaves the slowest behind and --require-all waits for everybody; "
            "give one of them"
        )
    if settings.work_deadline and settings.require_all:
        raise ValueError(
            "--work-deadline lets time decide how much a client does and --require-all is for "
            "runs in which time decides nothing; give one of them"
        )
    if settings.straggler_work == "none" and not settings.stragglers:
        raise ValueError("--straggler-work is of --stragglers; say which share they are")
    if settings.holdout and not settings.evaluate_on_clients:
        raise ValueError(
            f"--holdout {settings.holdout:g} keeps examples from training that nobody is asked "
            "about; add --evaluate-on-clients"
        )
    if settings.schedule_epochs > MAX_INT32:
        raise ValueError(
            f"--rounds times --epochs is {settings.schedule_epochs}, more than the {MAX_INT32} "
            "epochs that a schedule can go over; lower one of them"
        )
    if settings.warmup_epochs >= settings.schedule_epochs:
        raise ValueError(
            f"--warmup-epochs {settings.warmup_epochs:g} is all of the {settings.schedule_epochs} "
            f"epochs of a {settings.schedule_over}; lower it"
        )


def validate_strategy(settings: "ServerSettings", strategy: "Strategy") -> None:
    """Refuse settings with which a strategy can't work.

    Raises:
        InvalidInput: there are such settings.
    """
    if strategy.buffer_size:
        _validate_asynchrony(settings, strategy)
        return
    if settings.concurrency or settings.max_staleness is not None:
        raise InvalidInput(
            "--concurrency and --max-staleness are of asynchronous strategies alone; add "
            "--strategy fedbuff, or leave them out"
        )
    if updates_needed(settings) < strategy.min_updates:
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            f"but {updates_needed(settings)} are enough to close one; raise --min-updates (or "
            "--min-clients)"
        )
    if strategy.min_updates > 1 and settings.straggler_work == "none":
        raise InvalidInput(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates in a round, "
            "and --straggler-work none leaves clients out after a round's have been chosen; leave "
            "it away, or take another strategy"
        )


def _validate_asynchrony(settings: "ServerSettings", strategy: "Strategy") -> None:
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


def validate_compression(
    settings: "ServerSettings", *, compressed_bytes: int, model_bytes: int
) -> None:
    """Refuse a compression that makes updates larger: more than the model is never admitted.

    `model_bytes` are those of the model's parameters, `compressed_bytes` what they become.

    Raises:
        InvalidInput: it does.
    """
    if settings.compression != "none" and compressed_bytes >= model_bytes:
        raise InvalidInput(
            f"--compression {settings.compression} makes {compressed_bytes} bytes of the "
            f"{model_bytes} of this model's parameters; choose another one, or none"
        )


def validate_goals(settings: "ServerSettings", measured: Set[str] | None, *, task: str) -> None:
    """Refuse a best model or an early stop by a number that isn't measured.

    `measured` are the numbers that the held-out set gives, None if there is no such set.

    Raises:
        InvalidInput: a setting, or the task, names another number.
    """
    early = {
        "--stop-when": settings.bound.name if settings.bound else None,
        "--patience": settings.goal.name if settings.patience else None,
    }
    if measured is None:
        for flag, name in early.items():
            if name is not None:
                raise InvalidInput(
                    f"{flag} stops a run by its held-out set, but task {task!r} has none here; let "
                    "its load_test return examples, or leave the flag out"
                )
        return
    for flag, name in {"--best-by": settings.goal.name, **early}.items():
        if name is not None and name not in measured:
            raise InvalidInput(
                f"{flag} names {name!r}, but on its held-out set task {task!r} measures "
                f"{', '.join(sorted(measured))}; name one of these"
            )


def validate_going_on(state_dir: Path, differing: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse to go on with an unfinished run with other settings.

    `differing` has the recorded value and the value given now, by the setting's name.

    Raises:
        WrongSettings: a setting differs.
    """
    if not differing:
        return
    listed = "; ".join(
        f"{name} was {recorded!r}, is now {wanted!r}"
        for name, (recorded, wanted) in differing.items()
    )
    raise WrongSettings(
        f"{state_dir} holds an unfinished run with other settings ({listed}); "
        "start with the old ones to go on, or with another --state-dir for a new run"
    )


def validate_export(path: Path) -> None:
    """Refuse a path for the final model that can't be written to, before days of training."""
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--export {path}: there is no such folder; make it first")
    for file in (path, best_beside(path)):
        if file.is_dir():
            raise InvalidInput(
                f"--export {path}: {file} is a folder; name a file, such as "
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
    """Return the path of the best model, for a run whose last model isn't the best."""
    return last.with_stem(f"{last.stem}-best")


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

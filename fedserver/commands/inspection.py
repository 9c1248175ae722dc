"""The settings of every command that inspects a run, and its store opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from fedrounds.cli import Settings
from fedrounds.errors import InvalidInput, NotFound
from fedserver.records import Run
from fedserver.store import Store


class InspectionSettings(Settings):
    """Which run of which state-dir."""

    state_dir: Path = Field(default=Path("state/server"), description="the server's state-dir")
    run: int | None = Field(
        default=None, ge=1, description="number of the run; none: the latest run"
    )


@contextmanager
def opened_run(
    settings: InspectionSettings, *, to_write: bool = False
) -> Iterator[tuple[Store, Run]]:
    """Open the store, for reading unless `to_write`, and find the run.

    A server that runs may go on: readers and writers of different processes take turns.

    Raises:
        NotFound: there is no such store or run.
    """
    path = settings.state_dir / "federation.sqlite"
    # Looked at first: opened to write, a store that isn't there would be made.
    store = Store(path, read_only=not (to_write and path.exists()))
    try:
        run = store.runs.latest_run(number=settings.run)
        if run is None:
            which = "no run yet" if settings.run is None else f"no run {settings.run}"
            raise NotFound(f"{settings.state_dir} holds {which}; check --state-dir and --run")
        yield store, run
    finally:
        store.close()


@contextmanager
def drawing_into(path: Path, *, flag: str = "--out") -> Iterator[None]:
    """Say what is in the way of drawing.

    Raises:
        InvalidInput: matplotlib isn't installed, or the file can't be written.
    """
    try:
        yield
    except ImportError as error:
        raise InvalidInput(
            "drawing needs matplotlib; install it with: python -m pip install 'fedrounds[plot]'"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"can't draw into {path}: {reason}; choose {flag}") from error

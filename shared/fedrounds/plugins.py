"""Code of the user's own, named in the settings as `package.module:attribute`."""

import importlib
import importlib.util
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from fedrounds.errors import FederationError, InvalidInput, OwnCodeFailed


def validate_module(what: str, module_name: str) -> None:
    """Refuse a module that can't be imported because it isn't there; doesn't run its code.

    `what` is the setting that names it, such as "task 'mine:task'". Its packages are imported only
    where they say themselves where their modules are.

    Raises:
        InvalidInput: it is no module's name, or there is no such module.
    """
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise InvalidInput(
            f"{what}: {module_name!r} is a file, and a module is asked for: write {dotted} "
            "instead, without .py; its folder must be where it can be imported, or on PYTHONPATH"
        )
    if not all(module_name.split(".")):
        raise InvalidInput(
            f"{what}: {module_name!r} is no module's name; write it from the outermost package on, "
            "as package.module"
        )
    if not _is_there(module_name):
        raise InvalidInput(
            f"{what}: importing {module_name} failed (there is no module of this name); is it "
            "installed or on PYTHONPATH?"
        )


def import_own(what: str, module_name: str) -> ModuleType:
    """Import the module that `what` (such as "task 'mine:task'") names, that is, run its code.

    Raises:
        InvalidInput: there is no such module, or its code goes wrong; the message says in which
            file and line.
    """
    validate_module(what, module_name)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidInput(
            f"{what}: importing {module_name} failed ({error}); is it installed or on PYTHONPATH?"
        ) from error
    except SyntaxError as error:
        raise InvalidInput(f"{what}: {module_name} can't be read: {error}") from error
    # A module may raise whatever it likes, and a script without a main guard may end itself.
    except (Exception, SystemExit) as error:
        raise InvalidInput(
            f"{what}: importing {module_name} raised {type(error).__name__}: "
            f"{' '.join(str(error).split())}{_failed_line(error)}"
        ) from error


@contextmanager
def naming_task_errors(what: str) -> Iterator[None]:
    """Raise what a task's own code raises in this block as OwnCodeFailed; `what` names the block.

    Raises:
        OwnCodeFailed: with the error itself as its cause.
    """
    try:
        yield
    except FederationError:
        raise
    # SystemExit: a data set may parse arguments, and argparse ends the process.
    except (Exception, SystemExit) as error:
        raise OwnCodeFailed(f"{what} failed with {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """Return an error's type and its text, whatever its line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def show_error(error: BaseException) -> str:
    """Return an error with its traceback from the first file on that isn't of this package."""
    own_folders = tuple(f"{folder}{os.sep}" for folder in _own_folders())
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(own_folders):
        trace = trace.tb_next
    trace = trace or error.__traceback__
    return "".join(traceback.format_exception(type(error), error, trace))


def _own_folders() -> list[Path]:
    """Return where the project's three packages are; they needn't lie beside each other."""
    specs = (importlib.util.find_spec(name) for name in ("fedrounds", "fedclient", "fedserver"))
    return [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]


def _is_there(module_name: str) -> bool:
    """Return whether a module exists, without running a package's code if possible."""
    first, *names = module_name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:
        # It is imported already, as a script's __main__ is.
        return True
    if spec is None:
        return False
    for name in names:
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or ()))
        if spec is None:
            return _is_there_for_its_package(module_name)
    return True


def _is_there_for_its_package(module_name: str) -> bool:
    """Return whether a module exists; imports the packages that it is in."""
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:
        return False
    # Whatever else a package raises, importing it says it better.
    except (Exception, SystemExit):
        return True


def _failed_line(error: BaseException) -> str:
    """Return the line at which the innermost imported module failed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame for frame in frames if frame.name == "<module>" and not frame.filename.startswith("<")
    ]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""

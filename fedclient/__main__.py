"""`python -m fedclient --id 3`: take part in a run; `--ids 0-99` as many clients.

`partitions` shows how data is dealt out, `doctor` whether a client is fit to join.
"""

import importlib
import logging
import math
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fedrounds.cli  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(
        f"fedclient: {error.name} isn't installed; run scripts/setup in the clone, then "
        ".venv/bin/python -m fedclient; or install the project with pip"
    )

from fedclient.devices import refuse_absent_device
from fedclient.settings import (
    ClientSettings,
    DoctorCommandSettings,
    PartitionsSettings,
)
from fedrounds.cli import log_to_stderr, parse, print_error, silence_grpc
from fedrounds.errors import FederationError, NoAnswer
from fedrounds.memory import importing_what_stays, keep_freed_memory
from fedrounds.plugins import in_one_line, show_error
from fedrounds.standard_output import run_program
from fedrounds.stop_signals import StopSignals, interrupting
from fedrounds.tasks.names import validate_task_name

if TYPE_CHECKING:
    from fedclient.client_data import ClientData
    from fedclient.connection import Connection
    from fedclient.session import Patience

# Run as a module, this module's name is __main__, for which no log level is set.
logger = logging.getLogger("fedclient")

_GRACE_S = 1.0

COMMANDS: Mapping[str, type[PartitionsSettings | DoctorCommandSettings]] = {
    "partitions": PartitionsSettings,
    "doctor": DoctorCommandSettings,
}


def main(argv: list[str]) -> int:
    """Return the exit code.

    0: done or stopped; 1: failed or not ready; 2: wrong usage; 3: the server didn't answer.
    """
    silence_grpc()
    try:
        if argv and argv[0] in COMMANDS:
            return _run_command(argv[0], parse(COMMANDS[argv[0]], argv[1:]))
        settings = parse(ClientSettings, argv)
        log_to_stderr(settings.log_level)
        with StopSignals(exit_code=0) as signals:
            _run(settings, signals)
    except FederationError as error:
        print_error("fedclient", error)
        return 3 if isinstance(error, NoAnswer) else 1
    except KeyboardInterrupt:
        # No signal handler is set yet, and there is nothing to end.
        print("fedclient: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        # The task's own code may raise anything; the traceback shows where.
        print(show_error(error), file=sys.stderr)
        print(f"fedclient: ended by {in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _run_command(name: str, settings: PartitionsSettings | DoctorCommandSettings) -> int:
    """Return the exit code of a command, which keeps nothing that a stop could harm."""
    # The command runs the task's own code, so a signal must end it at any time.
    with StopSignals(exit_code=130), interrupting():
        device = settings.device if isinstance(settings, DoctorCommandSettings) else "cpu"
        _refuse_before_torch(task=settings.task, device=device)
        code: int = importlib.import_module(f"fedclient.commands.{name}").run(settings)
        return code


def _refuse_before_torch(*, task: str | None, device: str) -> None:
    """Refuse a task or device that can't be here: importing torch would take seconds more."""
    if task is not None:
        validate_task_name(task)
    refuse_absent_device(device)


def _run(settings: ClientSettings, signals: StopSignals) -> None:
    with interrupting():
        _refuse_before_torch(task=settings.task, device=settings.device)
    stop = threading.Event()
    signals.when_asked(lambda: logger.info("stopping"))
    signals.when_asked(stop.set)
    from fedclient.connection import Connection  # noqa: PLC0415
    from fedclient.progress import Stopped  # noqa: PLC0415
    from fedclient.session import Patience  # noqa: PLC0415
    from fedclient.terminal import Screen, showing  # noqa: PLC0415
    from fedrounds.files import locked_folder, raise_file_limit, unusable  # noqa: PLC0415

    keep_freed_memory()
    raise_file_limit()
    screen = Screen()
    with locked_folder(settings.folder) as state_dir, showing(screen) as hide:
        # A process that is cut off would leave a terminal without its cursor.
        signals.when_asked(hide)
        logger.info("connecting to %s", settings.route.describe())
        screen.wait_for(f"connecting to {settings.server}")
        connection = Connection(settings.route)
        give_up_after = settings.give_up_after
        patience = Patience(
            server=settings.server,
            stop=stop,
            give_up_after_s=math.inf if give_up_after == "never" else give_up_after,
            show_trouble=screen.show_trouble,
        )
        signals.when_asked(connection.close)
        lasting = set(threading.enumerate())
        try:
            client_data = _prepare_while_reaching(settings, connection, patience, stop)
            from fedclient.loop import take_part  # noqa: PLC0415

            take_part(
                settings,
                state_dir=state_dir,
                connection=connection,
                patience=patience,
                client_data=client_data,
                screen=screen,
                stop=stop,
                when_stopped=signals.when_asked,
            )
        except (Stopped, KeyboardInterrupt):
            logger.info("stopped; the same command goes on")
        except OSError as error:
            # A file elsewhere is the task's own, and its error is shown whole.
            is_ours = Path(str(error.filename)).is_relative_to(state_dir)
            raise (unusable(error) if is_ours else None) or error from error
        finally:
            connection.close()
            # gRPC's threads end soon after the channel does. One that would come back to an
            # interpreter on its way out takes the process down: "terminate called without an
            # active exception", https://github.com/pytorch/pytorch/issues/38228.
            for thread in set(threading.enumerate()) - lasting:
                thread.join(_GRACE_S)


def _prepare_while_reaching(
    settings: ClientSettings, connection: "Connection", patience: "Patience", stop: threading.Event
) -> "ClientData":
    """Import torch and load the task, while another thread reaches the server.

    torch takes seconds to import; a server that doesn't answer should show sooner.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="reach") as pool:
        reached = pool.submit(patience.reach, connection)
        try:
            client_data = _prepare(settings)
            reached.result()
        except BaseException:
            # The other thread ends too.
            stop.set()
            connection.close()
            raise
    return client_data


def _prepare(settings: ClientSettings) -> "ClientData":
    """Import torch; refuse a wrong device or task now, without a server."""
    with importing_what_stays():
        import torch  # noqa: PLC0415

        from fedclient.client_data import ClientData  # noqa: PLC0415
        from fedclient.devices import find_device  # noqa: PLC0415

    torch.set_num_threads(settings.threads)
    find_device(settings.device)
    return ClientData(settings)


def command() -> int:
    """Run the console script of this name."""
    return run_program("fedclient", main)


if __name__ == "__main__":
    sys.exit(command())

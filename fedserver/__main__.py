"""`python -m fedserver`: serve a run, or examine a run with a command."""

import importlib
import sys

try:
    import fedrounds.cli  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(
        f"fedserver: {error.name} isn't installed; run scripts/setup in the clone, then "
        ".venv/bin/python -m fedserver; or install the project with pip"
    )

from fedrounds import cli
from fedrounds.cli import log_to_stderr, parse, print_error, silence_grpc
from fedrounds.errors import FederationError
from fedrounds.memory import importing_what_stays
from fedrounds.standard_output import run_program
from fedrounds.tasks.names import validate_task_name
from fedserver.settings import ServerSettings

COMMANDS = cli.COMMANDS["python -m fedserver"]


def main(argv: list[str]) -> int:
    """Return the exit code: 0 done or stopped, 1 failed, 2 wrong usage; or a command's own."""
    silence_grpc()
    try:
        if argv and argv[0] in COMMANDS:
            # Imported when asked for: looking at a run must not wait for torch.
            command = importlib.import_module(f"fedserver.commands.{argv[0]}")
            code: int | None = command.run(argv[1:])
            return code or 0
        settings = parse(ServerSettings, argv)
        log_to_stderr(settings.log_level)
        # A wrong name is refused now: torch takes seconds to import.
        validate_task_name(settings.task)
        with importing_what_stays():
            from fedserver.server import run_server  # noqa: PLC0415

        run_server(settings)
    except FederationError as error:
        print_error("fedserver", error)
        return 1
    except KeyboardInterrupt:
        # Before there are signal handlers: there is nothing to end.
        print("fedserver: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        is_forbidden = isinstance(error, PermissionError)
        way_out = (
            "; run this as the server's user, or copy the state-dir and look at the copy"
            if is_forbidden
            else ""
        )
        print(f"fedserver: {error.filename}: {error.strerror}{way_out}", file=sys.stderr)
        return 1
    return 0


def command() -> int:
    """Run the console script of this name."""
    return run_program("fedserver", main)


if __name__ == "__main__":
    sys.exit(command())

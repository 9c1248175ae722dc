"""`python -m fedclient --id 3`: take part in a run; `--ids 0-99` as many clients.

`partitions` shows how data is dealt out, `doctor` whether a client is fit to join.
"""

import logging
import signal
import sys
import threading

from fedclient.settings import ClientSettings
from shared.cli import log_to_stderr, parse
from shared.errors import FederationError

# Run as a module this one is called __main__, which the log level isn't set for.
logger = logging.getLogger("fedclient")

_GRACE_S = 1.0

COMMANDS = ("partitions", "doctor")


def main(argv: list[str]) -> int:
    """Return the exit code: 0 done or stopped, 1 failed or not well, 2 wrong usage."""
    try:
        if argv and argv[0] == "partitions":
            from fedclient.commands import partitions  # noqa: PLC0415

            partitions.run(argv[1:])
            return 0
        if argv and argv[0] == "doctor":
            from fedclient.commands import doctor  # noqa: PLC0415

            return doctor.run(argv[1:])
        settings = parse(ClientSettings, argv, commands=COMMANDS)
        log_to_stderr(settings.log_level)
        _run(settings, _stop_when_asked())
    except FederationError as error:
        print(f"fedclient: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Before anybody listens for it: there is nothing to end.
        print("fedclient: stopped", file=sys.stderr)
        return 130
    return 0


def _stop_when_asked() -> threading.Event:
    """Return an event that SIGINT and SIGTERM set.

    From a thread: a signal handler runs inside whatever the main thread is doing, and if that is
    waiting for the event, or setting it for the signal before, it holds the event's lock already.
    """
    stop = threading.Event()
    asked = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)

    def wait() -> None:
        signal.sigwait(asked)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return stop


def _run(settings: ClientSettings, stop: threading.Event) -> None:
    # torch takes seconds to import: a wrong flag is told before.
    import torch  # noqa: PLC0415

    from fedclient.connection import Connection  # noqa: PLC0415
    from fedclient.loop import take_part  # noqa: PLC0415
    from fedclient.progress import Stopped  # noqa: PLC0415
    from shared.files import locked_folder  # noqa: PLC0415
    from shared.memory import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with locked_folder(settings.folder) as state_dir:
        connection = Connection(settings.server)

        def close_when_stopped() -> None:
            stop.wait()
            connection.close()

        threading.Thread(target=close_when_stopped, daemon=True).start()
        lasting = set(threading.enumerate())
        try:
            take_part(settings, state_dir=state_dir, connection=connection, stop=stop)
        except Stopped:
            logger.info("stopped; the same command goes on")
        finally:
            connection.close()
            # gRPC's threads end soon after the channel does. One that would come back to an
            # interpreter on its way out takes the process down: "terminate called without an
            # active exception", https://github.com/pytorch/pytorch/issues/38228.
            for thread in set(threading.enumerate()) - lasting:
                thread.join(_GRACE_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m fedclient --id 3`: take part in a run; `partitions` shows how data is dealt out."""

import logging
import signal
import sys
import threading

from fedclient.settings import ClientSettings
from shared.cli import log_to_stderr, parse
from shared.errors import FederationError

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Return the exit code: 0 done or stopped, 1 failed, 2 wrong usage."""
    try:
        if argv and argv[0] == "partitions":
            from fedclient.commands import partitions  # noqa: PLC0415

            partitions.run(argv[1:])
            return 0
        settings = parse(ClientSettings, argv)
        log_to_stderr(settings.log_level)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        _run(settings, stop)
    except FederationError as error:
        print(f"fedclient: {error}", file=sys.stderr)
        return 1
    return 0


def _run(settings: ClientSettings, stop: threading.Event) -> None:
    # torch takes seconds to import: a wrong flag is told before.
    import torch  # noqa: PLC0415

    from fedclient.connection import Connection  # noqa: PLC0415
    from fedclient.loop import Client  # noqa: PLC0415
    from fedclient.progress import Stopped  # noqa: PLC0415
    from shared.files import locked_folder  # noqa: PLC0415

    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with locked_folder(settings.folder) as state_dir:
        connection = Connection(settings.server)

        def close_when_stopped() -> None:
            stop.wait()
            connection.close()

        threading.Thread(target=close_when_stopped, daemon=True).start()
        try:
            Client(settings, state_dir=state_dir, connection=connection, stop=stop).run()
        except Stopped:
            logger.info("stopped; the same command goes on")
        finally:
            connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

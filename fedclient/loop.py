"""The client's life: register, pull, train, push, until the run is done.

Everything it needs after a crash is in the state-dir: who it is, the updates not yet acknowledged,
the blobs it holds. Everything else it asks the server for again.
"""

import logging
import threading
import uuid
from pathlib import Path

from fedclient.connection import Connection
from fedclient.holdings import Holdings
from fedclient.orders import OrderWorker
from fedclient.session import Patience, ServerSession
from fedclient.settings import ClientSettings
from fedclient.terminal import Screen
from shared.errors import RunFailed
from shared.files import replace_file
from shared.types import RunEnd, RunFailure, SessionInfo

logger = logging.getLogger(__name__)

_STAY_PAUSE_S = 1.0
_FAILURES = {
    RunFailure.TOO_FEW_UPDATES: "too few clients delivered an update, again and again",
    RunFailure.TOO_MANY_EXCLUDED: "too many updates were excluded, again and again",
    RunFailure.NOT_AGGREGATED: "the updates couldn't be aggregated to a finite model",
    RunFailure.UPDATES_DAMAGED: "updates were damaged on the server's disk",
}


def take_part(
    settings: ClientSettings,
    *,
    state_dir: Path,
    connection: Connection,
    patience: Patience,
    holdings: Holdings,
    screen: Screen,
    stop: threading.Event,
) -> None:
    """Work until the run is done (or for ever, if told to stay); `state_dir` is locked.

    Raises:
        Stopped: somebody asked for it.
        RunFailed: the run failed.
        FederationError: a person's mistake, with a sentence that says which.
    """

    def load(info: SessionInfo) -> tuple[int, ...]:
        """Load the run's data; says which run it is, and how many examples there are."""
        logger.info(
            "connected to %s: run %s, task %s, %d rounds",
            *(settings.server, info.run_id, info.task, info.total_rounds),
        )
        screen.wait_for("loading the data")
        screen.expect_rounds(info.total_rounds)
        num_examples = holdings.load(info)
        logger.info("%s; waiting for the first order", _described(settings, num_examples))
        screen.wait_for("waiting for the first order; a round begins when enough clients are there")
        return num_examples

    session = ServerSession(
        connection,
        patience=patience,
        client_ids=settings.client_ids,
        instance_key=_instance_key(state_dir),
        task=settings.task or "",
        load_data=load,
    )
    worker = OrderWorker(
        settings,
        state_dir=state_dir,
        session=session,
        holdings=holdings,
        screen=screen,
        stop=stop,
    )
    session.open()
    worker.deliver_waiting()
    while True:
        work = session.call(
            lambda info: connection.pull_work(info.session_id, wait_s=info.max_wait_s)
        )
        if work.order is not None:
            worker.work_on(work.order)
        elif work.run_end is not None:
            if work.run_end.has_failed and not settings.stay:
                raise RunFailed(_failure_text(work.run_end))
            if work.run_end.has_failed:
                logger.warning("%s", _failure_text(work.run_end))
            else:
                logger.info("the run is done")
            if not settings.stay:
                return
            session.pause(_STAY_PAUSE_S)


def _failure_text(run_end: RunEnd) -> str:
    """Return the sentence for a run that failed."""
    reason = _FAILURES[run_end.failure] if run_end.failure else "the server doesn't say why"
    return f"the run failed: {reason}. The server's operator sees more in the run's history"


def _described(settings: ClientSettings, num_examples: tuple[int, ...]) -> str:
    """Return in words who this process is and how much data it has."""
    if settings.ids is None:
        return f"client {settings.id} has {num_examples[0]} examples"
    return f"{len(num_examples)} clients ({settings.ids}) have {sum(num_examples)} examples"


def _instance_key(state_dir: Path) -> str:
    """Return the random text that tells this state-dir from all others, made once."""
    path = state_dir / "instance.key"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode(), survive_power_loss=True)
    return path.read_text().strip()

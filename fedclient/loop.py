"""The client's main loop: register, pull, train, push, until the run is done.

After a crash it needs only what is in the state-dir: the instance key, the updates not acknowledged
yet, and the blobs. It asks the server for everything else again.
"""

import logging
import math
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from fedclient.client_data import ClientData
from fedclient.connection import Connection
from fedclient.goodbye import Goodbye
from fedclient.orders import OrderWorker
from fedclient.progress import Stopped
from fedclient.session import Patience, ServerSession
from fedclient.settings import ClientSettings
from fedclient.terminal import Screen
from fedrounds.errors import FederationError, NoAnswer, OwnCodeFailed, RunFailed, TaskFailed
from fedrounds.files import replace_file
from fedrounds.plugins import in_one_line
from fedrounds.types import LeaveReason, RunEnd, RunFailure, SessionInfo, Waiting, Work

logger = logging.getLogger(__name__)

_STAY_PAUSE_S = 1.0
_FIRST_WAIT_S = 1.0
"""The wait of the first pull for work; short, to show soon what the client waits for."""
_FAILURES = {
    RunFailure.TOO_FEW_UPDATES: "too few clients delivered an update, again and again",
    RunFailure.TOO_MANY_EXCLUDED: "too many updates were excluded, again and again",
    RunFailure.NOT_AGGREGATED: "the updates couldn't be aggregated to a finite model",
    RunFailure.UPDATES_DAMAGED: "updates were damaged on the server's disk",
    RunFailure.UPDATES_REFUSED: "the server refused updates of clients, again and again",
}


def take_part(
    settings: ClientSettings,
    *,
    state_dir: Path,
    connection: Connection,
    patience: Patience,
    client_data: ClientData,
    screen: Screen,
    stop: threading.Event,
    when_stopped: Callable[[Callable[[], None]], None],
) -> None:
    """Work until the run is done (or forever, with --stay); `state_dir` is locked.

    If the process ends before the run does, it says goodbye to the server. `when_stopped(act)`
    makes another thread call `act` when somebody asks for a stop.

    Raises:
        Stopped: somebody asked the process to end.
        RunFailed: the run failed.
        TaskFailed: the task's own code failed for some of the ids.
        NoAnswer: the server didn't answer for too long.
        FederationError: a mistake in settings or data; the message says which.
        OwnCodeFailed: the task's own code failed for the last id that was left.
    """

    def load(info: SessionInfo) -> tuple[int, ...]:
        """Load the run's data and return the numbers of examples; log both."""
        logger.info(
            "connected to %s: run %s, task %s, %d rounds",
            settings.server,
            info.run_id,
            info.task,
            info.total_rounds,
        )
        screen.wait_for("loading the data")
        screen.expect_rounds(info.total_rounds)
        num_examples = client_data.load(info)
        logger.info("%s; waiting for the first order", _described(settings, num_examples))
        screen.wait_for("waiting for the first order")
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
        client_data=client_data,
        screen=screen,
        stop=stop,
    )
    goodbye = Goodbye(
        session,
        route=settings.route,
        kept_order_ids=worker.kept_order_ids,
        coming_back=settings.will_restart,
    )
    when_stopped(goodbye.say_stopped_soon)
    try:
        session.open()
        worker.deliver_waiting()
        _work(
            settings,
            connection=connection,
            session=session,
            worker=worker,
            client_data=client_data,
            screen=screen,
        )
    except (Stopped, KeyboardInterrupt):
        goodbye.say(LeaveReason.STOPPED)
        raise
    except (RunFailed, TaskFailed, NoAnswer):
        # The run is over, or the server doesn't answer: no goodbye.
        raise
    except OwnCodeFailed:
        goodbye.say(LeaveReason.TASK_FAILED)
        raise
    except FederationError:
        goodbye.say(LeaveReason.GAVE_UP)
        raise
    except Exception:
        goodbye.say(LeaveReason.TASK_FAILED)
        raise


def _work(
    settings: ClientSettings,
    *,
    connection: Connection,
    session: ServerSession,
    worker: OrderWorker,
    client_data: ClientData,
    screen: Screen,
) -> None:
    """Work on orders until the run is over; show and log why there is no order yet."""
    num_failed = 0
    logged: Waiting | None = None
    longest_s = _FIRST_WAIT_S

    def pull(info: SessionInfo) -> Work:
        return connection.pull_work(info.session_id, wait_s=min(info.max_wait_s, longest_s))

    def say(waiting: Waiting) -> None:
        nonlocal logged
        text = _waiting_text(waiting)
        screen.wait_for(text)
        if logged is None or not _is_same_wait(logged, waiting):
            logger.info("%s", text)
        logged = waiting

    while True:
        work = session.call(pull)
        longest_s = math.inf
        if work.waiting is not None:
            say(work.waiting)
        if work.order is not None:
            client_id = work.order.client_id
            try:
                worker.work_on(work.order)
            except (FederationError, Stopped):
                raise
            except (Exception, SystemExit) as error:
                if len(session.client_ids) == 1:
                    raise OwnCodeFailed(
                        f"task {client_data.task.name!r}: training in round "
                        f"{work.order.round_number} failed with {in_one_line(error)}"
                    ) from error
                logger.exception(
                    "client %d leaves the run, since the task's own code failed; the others stay",
                    client_id,
                )
                session.leave(client_id, LeaveReason.TASK_FAILED)
                num_failed += 1
        elif work.run_end is not None:
            if work.run_end.has_failed and not settings.stay:
                raise RunFailed(_failure_text(work.run_end))
            if work.run_end.has_failed:
                logger.warning("%s", _failure_text(work.run_end))
            else:
                logger.info("the run is done")
            if (num_out := num_failed + client_data.num_unreadable) and not settings.stay:
                raise TaskFailed(
                    f"{num_out} of {len(settings.client_ids)} clients left the run or took no "
                    "part, since the task's own code failed; the log says how"
                )
            if not settings.stay:
                return
            session.pause(_STAY_PAUSE_S)


def _is_same_wait(before: Waiting, now: Waiting) -> bool:
    """Return whether two answers have the same reason; their numbers change all the time."""
    is_same_for_rounds = bool(before.round_number) == bool(now.round_number)
    return is_same_for_rounds and before.clients_needed == now.clients_needed


def _waiting_text(waiting: Waiting) -> str:
    """Return in words why there is no order yet."""
    if waiting.round_number:
        return f"round {waiting.round_number} is running; waiting for an order"
    if waiting.clients_needed:
        here, needed = waiting.clients_here, waiting.clients_needed
        return f"waiting for clients: {here} of the {needed} that a round needs are here"
    return "waiting for the next round to open"


def _failure_text(run_end: RunEnd) -> str:
    """Return the sentence for a run that failed."""
    reason = _FAILURES[run_end.failure] if run_end.failure else "the server doesn't say why"
    return f"the run failed: {reason}. The server's operator sees more in the run's history"


def _described(settings: ClientSettings, num_examples: tuple[int, ...]) -> str:
    """Return the clients of this process and their numbers of examples, in words."""
    if settings.ids is None:
        return f"client {settings.id} has {num_examples[0]} examples"
    return f"{len(num_examples)} clients ({settings.ids}) have {sum(num_examples)} examples"


def _instance_key(state_dir: Path) -> str:
    """Return the random text that identifies this state-dir; create it once."""
    path = state_dir / "instance.key"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode(), survive_power_loss=True)
    return path.read_text().strip()

"""The client's life: register, pull, train, push, until the run is done.

Everything it needs after a crash is in the state-dir: who it is, the updates not yet acknowledged,
the blobs it holds. Everything else it asks the server for again.
"""

import functools
import logging
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fedclient.cache import BlobCache
from fedclient.connection import Connection
from fedclient.devices import find_device
from fedclient.outbox import Outbox
from fedclient.progress import OrderAbandoned, ProgressReporter, Stopped
from fedclient.settings import ClientSettings
from fedclient.state import ClientStates, StateLost
from fedclient.training import train_order
from shared import __version__
from shared.diagnosis import Diagnosis
from shared.diagnosis_text import verdict
from shared.doctor import TrainingHalted
from shared.doctor.easing import Convalescence
from shared.errors import (
    CorruptPayload,
    FederationError,
    NotFound,
    OutOfSpace,
    StreamFenced,
    UnknownSession,
    WrongOffset,
    WrongSettings,
)
from shared.failpoints import FailPoint, pass_by
from shared.files import replace_file
from shared.tasks import DataRequest, Examples, Partition, Task, examine_examples, find_task
from shared.training import incident_of
from shared.types import (
    ClientUpdate,
    Counters,
    Directive,
    Incident,
    IncidentKind,
    Receipt,
    Registration,
    SessionInfo,
    WorkOrder,
    WorkState,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_STAY_PAUSE_S = 1.0


class Client:
    """One client id and its session; `state_dir` is locked by the caller."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        state_dir: Path,
        connection: Connection,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._stop = stop
        self._instance_key = _instance_key(state_dir)
        self._outbox = Outbox(state_dir / "outbox")
        self._cache = BlobCache(state_dir / "blobs")
        self._states = ClientStates(state_dir / "states")
        self._device = find_device(settings.device)
        self._session: SessionInfo | None = None
        self._data: tuple[SessionInfo, Task, Examples] | None = None

    def run(self) -> None:
        """Work until the run is done (or for ever, if told to stay).

        Raises:
            Stopped: somebody asked for it.
            FederationError: a person's mistake, with a sentence that says which.
        """
        self._persist(self._register)
        for update in self._outbox.waiting():
            logger.info("order %s is trained and not acknowledged yet", update.order_id)
            self._deliver(update, is_new=False, on_sent=lambda _: None)
        while True:
            work = self._call(
                lambda session: self._connection.pull_work(
                    session.session_id, wait_s=session.max_wait_s
                )
            )
            if work.order is not None:
                self._work_on(work.order)
            elif work.state is WorkState.FINISHED:
                logger.info("the run is done")
                if not self._settings.stay:
                    return
                self._pause(_STAY_PAUSE_S)

    def _work_on(self, order: WorkOrder) -> None:
        pass_by(FailPoint.ORDER_PULLED)
        update = self._outbox.find(order.order_id)
        is_new = update is None
        reporter = ProgressReporter(functools.partial(self._report, order), stop=self._stop)
        with reporter as progress:
            try:
                if update is None:
                    update = self._train(order, progress)
                    self._tell_incidents(order, progress, gave_up=False)
                self._deliver(
                    update,
                    is_new=is_new,
                    on_sent=lambda count: progress.add(bytes_sent=count),
                )
            except OrderAbandoned:
                logger.info("round %d: the server wants no update any more", order.round_number)
            except TrainingHalted as error:
                logger.warning("round %d: %s; no update is sent", order.round_number, error)
                self._tell_incidents(order, progress, gave_up=True)
            except NotFound as error:
                # Its model is gone: the round has ended meanwhile.
                logger.info("round %d: %s", order.round_number, error)
                self._pause(_FIRST_PAUSE_S)
            except OutOfSpace as error:
                # The order stays open and is asked for again.
                logger.warning("round %d: %s", order.round_number, error)
                self._pause(_LONGEST_PAUSE_S)
            except Stopped:
                raise
            except Exception:
                # The task's own code may fail in any way: the server must hear of it (its kind,
                # not its text), and the person here sees the rest as this process ends.
                progress.note(Incident(kind=IncidentKind.TRAINING_FAILED))
                self._tell_incidents(order, progress, gave_up=True)
                raise

    def _train(self, order: WorkOrder, progress: ProgressReporter) -> ClientUpdate:
        assert self._data is not None
        _, task, examples = self._data
        state = self._state_in_force(order, progress)
        global_model = self._fetch(order, progress)
        pass_by(FailPoint.MODEL_FETCHED)

        def tell(diagnosis: Diagnosis) -> None:
            logger.warning("round %d: %s", order.round_number, verdict(diagnosis))
            may_tell = self._settings.report_samples
            progress.note(incident_of(diagnosis if may_tell else diagnosis.without_samples()))

        update, next_state = train_order(
            order,
            task=task,
            examples=examples,
            global_model=global_model,
            device=self._device,
            progress=progress,
            payload=self._outbox.draft_path(order.order_id),
            log_steps=self._settings.log_steps,
            doctor=self._settings.doctor_settings,
            state=state,
            on_diagnosis=tell,
        )
        pass_by(FailPoint.TRAINED)
        self._states.keep(order.order_id, next_state, follows=order.last_counted_order_id)
        self._outbox.put(update)
        pass_by(FailPoint.UPDATE_KEPT)
        return update

    def _state_in_force(self, order: WorkOrder, progress: ProgressReporter) -> Convalescence:
        try:
            return self._states.promoted(order.last_counted_order_id)
        except StateLost as error:
            logger.warning("round %d: %s", order.round_number, error)
            progress.note(Incident(kind=IncidentKind.CLIENT_STATE_LOST))
            return Convalescence()

    def _fetch(self, order: WorkOrder, progress: ProgressReporter) -> Path:
        section = order.sections[0]

        def download(session: SessionInfo) -> Path:
            def pieces(offset: int) -> Iterator[memoryview]:
                for data in self._connection.download(
                    session.session_id, section.digest, offset=offset
                ):
                    progress.add(bytes_received=len(data))
                    yield data

            return self._cache.fetch(section.digest, pieces)

        return self._call(download, how_far=lambda: progress.counters.bytes_received)

    def _deliver(
        self, update: ClientUpdate, *, is_new: bool, on_sent: Callable[[int], None]
    ) -> None:
        """Send an update until the server gives its receipt, then forget it.

        Of one that `is_new` nothing was sent yet: the server isn't asked how much it has.
        """
        offset = 0

        def send(session: SessionInfo) -> str:
            nonlocal offset, is_new
            while True:
                try:
                    if not is_new:
                        offset = self._connection.committed_bytes(session.session_id, update)
                    is_new = False
                    answer = self._connection.upload(
                        session.session_id,
                        update,
                        self._outbox.payload_path(update.order_id),
                        offset=offset,
                        on_sent=on_sent,
                    )
                except (WrongOffset, CorruptPayload, StreamFenced) as error:
                    logger.warning("order %s: %s", update.order_id, error)
                    self._pause(_FIRST_PAUSE_S)
                except NotFound:
                    return "of a run the server doesn't know"
                else:
                    if answer.receipt is Receipt.REFUSED:
                        return f"refused: {answer.reason}"
                    return answer.receipt.value

        outcome = self._call(send, how_far=lambda: offset)
        pass_by(FailPoint.RECEIPT_GIVEN)
        self._outbox.drop(update.order_id)
        is_good = outcome in (Receipt.STORED, Receipt.DUPLICATE)
        logger.log(
            logging.INFO if is_good else logging.WARNING,
            "order %s: update %s (num_examples=%d loss=%.4g accuracy=%.4g)",
            update.order_id,
            outcome,
            update.num_examples,
            update.metrics["loss"],
            update.metrics["accuracy"],
        )

    def _report(
        self, order: WorkOrder, counters: Counters, incidents: Sequence[tuple[int, Incident]]
    ) -> Directive:
        assert self._session is not None
        return self._connection.report_progress(
            self._session.session_id, order.order_id, counters=counters, incidents=incidents
        )

    def _tell_incidents(
        self, order: WorkOrder, progress: ProgressReporter, *, gave_up: bool
    ) -> None:
        """Make sure that the server knows of all that went wrong, and whether an update comes."""
        if not gave_up and not progress.unreported:
            return
        self._call(
            lambda session: self._connection.report_progress(
                session.session_id,
                order.order_id,
                counters=progress.counters,
                incidents=progress.unreported,
                gave_up=gave_up,
            )
        )

    # ---- session

    def _register(self) -> None:
        """Open the session; the first answer tells which data the second call gives the size of."""
        settings = self._settings

        def register(num_examples: tuple[int, ...]) -> SessionInfo:
            return self._connection.register(
                Registration(
                    client_ids=(settings.id,),
                    instance_key=self._instance_key,
                    software_version=__version__,
                    task=settings.task or "",
                    num_examples=num_examples,
                )
            )

        session = register(())
        examples = self._load_data(session)
        self._session = register((len(examples),))  # type: ignore[arg-type]

    def _load_data(self, session: SessionInfo) -> Examples:
        settings = self._settings
        if self._data is not None:
            known, _, examples = self._data
            if (known.task, known.partitioning) == (session.task, session.partitioning):
                return examples
        if ":" in session.task and settings.task is None:
            raise WrongSettings(
                f"the run's task {session.task!r} is code of somebody's own; if you trust it and "
                f"have it here, start with --task {session.task}"
            )
        task = find_task(session.task)
        dealt = session.partitioning
        partition = Partition(
            scheme=dealt.scheme,
            num_partitions=dealt.num_partitions,
            index=settings.id,
            seed=dealt.seed,
            parameters=dealt.parameters,
        )
        examples = task.load_train(
            DataRequest(
                data_root=settings.data_root,
                partition=partition if settings.source == "partition" else None,
            )
        )
        if bad := examine_examples(task, examples):
            logger.warning(
                "%d examples hold a NaN or an infinity, the first is number %d (from 0); training "
                "will stop where it meets one",
                *(len(bad), bad[0]),
            )
        self._data = (session, task, examples)
        return examples

    # ---- patience

    def _call(
        self, call: Callable[[SessionInfo], T], *, how_far: Callable[[], int] = lambda: 0
    ) -> T:
        """Make a call with the session in force; where the server has forgotten it, a new one."""

        def attempt() -> T:
            assert self._session is not None
            try:
                return call(self._session)
            except UnknownSession:
                self._register()
                return call(self._session)

        return self._persist(attempt, how_far=how_far)

    def _persist(self, attempt: Callable[[], T], *, how_far: Callable[[], int] = lambda: 0) -> T:
        """Try until the server answers; says so once when it doesn't and once when it does again.

        The pauses between tries grow, and begin anew when an attempt got further than the last.

        Raises:
            Stopped: the process is asked to end.
            FederationError: an answer that trying again won't change.
        """
        pause_s, reached = _FIRST_PAUSE_S, how_far()
        has_said_so = False
        while True:
            try:
                result = attempt()
            except FederationError as error:
                if self._stop.is_set():
                    raise Stopped from None
                if not error.retry:
                    raise
                if not has_said_so:
                    logger.warning(
                        "no answer from %s (%s); trying again until there is one",
                        self._settings.server,
                        error,
                    )
                    has_said_so = True
                if how_far() > reached:
                    pause_s, reached = _FIRST_PAUSE_S, how_far()
                # Jitter keeps a fleet from coming back all at once.
                self._pause(random.uniform(pause_s / 2, pause_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if has_said_so:
                    logger.info("%s answers again", self._settings.server)
                return result

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


def _instance_key(state_dir: Path) -> str:
    """Return the random text that tells this state-dir from all others, made once."""
    path = state_dir / "instance.key"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode(), survive_power_loss=True)
    return path.read_text().strip()

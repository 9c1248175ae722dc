"""The work on one order of one client: fetch its model, train, keep the update, deliver it.

The clients of one process share the outbox and the blobs; each has a state of its own.

Each step begins with what is in the state-dir, and can be repeated after a crash with the same
result.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedclient.cache import BlobCache
from fedclient.client_data import ClientData
from fedclient.devices import find_device
from fedclient.outbox import Outbox
from fedclient.progress import OrderEnded, ProgressReporter, Stopped
from fedclient.session import FIRST_PAUSE_S, LONGEST_PAUSE_S, ServerSession
from fedclient.settings import ClientSettings
from fedclient.state import ClientState, ClientStates, StateLost
from fedclient.terminal import Screen
from fedclient.training import LocalSettings, NothingLearned, OrderInputs, train_order
from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import (
    CorruptPayload,
    InvalidInput,
    NotFound,
    OutOfSpace,
    StreamFenced,
    UnknownSession,
    WrongOffset,
    WrongSettings,
)
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.stop_signals import interrupting
from fedrounds.training.determinism import repeatable
from fedrounds.training.loop import incident_of
from fedrounds.types import (
    CONTROL_SECTION,
    MODEL_SECTION,
    ClientUpdate,
    Counters,
    Incident,
    IncidentKind,
    OrderEnd,
    Receipt,
    Section,
    SessionInfo,
    UploadAnswer,
    WorkOrder,
)

logger = logging.getLogger(__name__)

_GOOD_RECEIPTS = (Receipt.STORED, Receipt.DUPLICATE)
_UNNEEDED = (OrderEnd.ATTEMPT_FAILED, OrderEnd.TAKEN_BACK, OrderEnd.RUN_STOPPED)
"""After these ends the update was in time: nothing went wrong at this client."""
_ORDER_ENDS = {
    OrderEnd.ROUND_CLOSED: "the round went on without it",
    OrderEnd.ATTEMPT_FAILED: (
        "this attempt at the round failed for want of other clients' updates"
    ),
    OrderEnd.GIVEN_UP: "the server no longer waits for it",
    OrderEnd.TAKEN_BACK: "the model that it began with was taken back",
    OrderEnd.RUN_STOPPED: "the run has stopped with the model that it began with",
    OrderEnd.OTHER: "the order has ended",
}


class OrderWorker:
    """Works on orders, one after another; owns their files in `state_dir`."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        state_dir: Path,
        session: ServerSession,
        client_data: ClientData,
        screen: Screen,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._session = session
        self._client_data = client_data
        self._screen = screen
        self._stop = stop
        self._outbox = Outbox(state_dir / "outbox")
        self._cache = BlobCache(state_dir / "blobs")
        self._states_folder = state_dir / "states"
        self._local_settings = LocalSettings(
            device=find_device(settings.device),
            doctor=settings.doctor_settings,
            log_steps=settings.log_steps,
            max_steps=settings.max_steps,
        )

    def deliver_waiting(self) -> None:
        """Deliver the updates for which an earlier process got no receipt."""
        for update in self._outbox.waiting():
            logger.info("order %s is trained and not acknowledged yet", update.order_id)
            label = f"order {update.order_id}"
            self._deliver(update, label=label, is_new=False, on_sent=lambda _: None)

    def kept_order_ids(self) -> list[str]:
        """Return the ids of orders whose updates wait here until the server has them."""
        return self._outbox.order_ids()

    def work_on(self, order: WorkOrder) -> None:
        """Train an order and deliver its update, or report why not.

        An update that is here already is delivered without training.

        Raises:
            Stopped: somebody asked the process to end.
            WrongSettings: the order is for a client that this process doesn't serve.
            Exception: what the task's own code raised; its incident is reported, and the order is
                still open.
        """
        if order.client_id not in self._settings.client_ids:
            raise WrongSettings(
                f"the server's order {order.order_id} is for client {order.client_id}, which "
                "this process doesn't serve"
            )
        failpoint(FailPoint.ORDER_PULLED)
        update = self._outbox.find(order.order_id)
        is_new = update is None
        reporter = ProgressReporter(functools.partial(self._report, order), stop=self._stop)
        with reporter as progress, self._screen.working_on(order, progress):
            try:
                if update is None:
                    update = self._train(order, progress)
                    self._report_incidents(order, progress, gave_up=False)
                self._deliver(
                    update,
                    label=_order_label(order),
                    is_new=is_new,
                    on_sent=lambda count: progress.add(bytes_sent=count),
                )
                self._screen.count_sent(order.round_number)
            except OrderEnded as ended:
                logger.info(
                    "%s: the server wants no update any more: %s",
                    _order_label(order),
                    _ORDER_ENDS[ended.order_end],
                )
            except (TrainingHalted, NothingLearned) as error:
                # The error that the step raised goes to this client's log only.
                logger.warning(
                    "%s: %s; no update is sent",
                    _order_label(order),
                    error,
                    exc_info=error.__cause__,
                )
                self._report_incidents(order, progress, gave_up=True)
            except NotFound as error:
                # The server has deleted the order's model: the round has ended meanwhile.
                logger.info("%s: %s", _order_label(order), error)
                self._session.pause(FIRST_PAUSE_S)
            except OutOfSpace as error:
                # The order stays open; the server will give it again.
                logger.warning("%s: %s", _order_label(order), error)
                self._session.pause(LONGEST_PAUSE_S)
            except Stopped:
                raise
            except (Exception, SystemExit):
                # The task's own code may raise anything. The server gets the kind of incident and
                # no text; this client's log gets the rest. The order ends when its client leaves: a
                # client that gave up first could get another order before it has left.
                progress.note(Incident(kind=IncidentKind.TRAINING_FAILED))
                self._report_incidents(order, progress, gave_up=False)
                raise

    def _train(self, order: WorkOrder, progress: ProgressReporter) -> ClientUpdate:
        # Read the run id now: the session may belong to another run when training is done.
        states = ClientStates(
            self._states_folder / str(order.client_id), run_id=self._session.info.run_id
        )
        state = self._state_in_force(states, order, progress)
        sections = {section.name: self._fetch(section, progress) for section in order.sections}
        failpoint(FailPoint.MODEL_FETCHED)

        def report_diagnosis(diagnosis: Diagnosis) -> None:
            logger.warning("%s: %s", _order_label(order), verdict(diagnosis))
            if not self._settings.report_samples:
                diagnosis = diagnosis.without_samples()
            progress.note(incident_of(diagnosis))

        with interrupting(), repeatable(num_threads=self._settings.threads):
            inputs = OrderInputs(
                order=order,
                task=self._client_data.task,
                examples=self._client_data.examples_of(order.client_id),
                global_model=sections[MODEL_SECTION],
                control=sections.get(CONTROL_SECTION),
                state=state,
                compression=self._session.info.compression,
                entry_kinds=self._session.info.entry_kinds,
            )
            update, next_state = train_order(
                inputs,
                self._local_settings,
                progress=progress,
                payload=self._outbox.draft_path(order.order_id),
                on_diagnosis=report_diagnosis,
            )
        failpoint(FailPoint.TRAINED)
        states.keep(order.order_id, next_state, follows=order.last_counted_order_id)
        self._outbox.put(update)
        failpoint(FailPoint.UPDATE_KEPT)
        return update

    def _state_in_force(
        self, states: ClientStates, order: WorkOrder, progress: ProgressReporter
    ) -> ClientState:
        try:
            return states.promoted(order.last_counted_order_id)
        except StateLost as error:
            logger.warning("%s: %s", _order_label(order), error)
            progress.note(Incident(kind=IncidentKind.CLIENT_STATE_LOST))
            return ClientState()

    def _fetch(self, section: Section, progress: ProgressReporter) -> Path:
        def download(session: SessionInfo) -> Path:
            def pieces(offset: int) -> Iterator[memoryview]:
                for data in self._session.connection.download(
                    session.session_id, section.digest, offset=offset
                ):
                    progress.add(bytes_received=len(data))
                    yield data

            return self._cache.fetch(section, pieces)

        return self._session.call(download, how_far=lambda: progress.counters.bytes_received)

    def _deliver(
        self, update: ClientUpdate, *, label: str, is_new: bool, on_sent: Callable[[int], None]
    ) -> None:
        """Send an update until the server gives its receipt, then delete it.

        `label` names its order in the log. `is_new`: no byte of it was sent yet, so the server
        isn't asked how much it has.
        """
        offset = 0

        def send(session: SessionInfo) -> UploadAnswer | None:
            """Return the server's answer, None if the server doesn't know the order."""
            nonlocal offset, is_new
            while True:
                try:
                    if not is_new:
                        offset = self._session.connection.committed_bytes(
                            session.session_id, update
                        )
                    is_new = False
                    answer = self._session.connection.upload(
                        session.session_id,
                        update,
                        self._outbox.payload_path(update.order_id),
                        offset=offset,
                        on_sent=on_sent,
                    )
                except (WrongOffset, CorruptPayload, StreamFenced) as error:
                    logger.warning("order %s: %s", update.order_id, error)
                    self._session.pause(FIRST_PAUSE_S)
                except UnknownSession:
                    raise
                except NotFound:
                    return None
                else:
                    return answer

        answer = self._session.call(send, how_far=lambda: offset)
        failpoint(FailPoint.RECEIPT_GIVEN)
        self._outbox.drop(update.order_id)
        is_problem = answer is None or answer.receipt not in _GOOD_RECEIPTS
        if answer is not None and answer.order_end in _UNNEEDED:
            is_problem = False
        logger.log(
            logging.WARNING if is_problem else logging.INFO,
            "%s: update %s (%s)",
            label,
            _answer_text(answer),
            _measured_text(update),
        )

    def _report(
        self, order: WorkOrder, counters: Counters, incidents: Sequence[tuple[int, Incident]]
    ) -> OrderEnd | None:
        return self._session.connection.report_progress(
            self._session.info.session_id, order.order_id, counters=counters, incidents=incidents
        )

    def _report_incidents(
        self, order: WorkOrder, progress: ProgressReporter, *, gave_up: bool
    ) -> None:
        """Make sure that the server has all incidents, and knows if no update will come."""
        if not gave_up and not progress.unreported:
            return

        def report(session: SessionInfo, incidents: Sequence[tuple[int, Incident]]) -> None:
            self._session.connection.report_progress(
                session.session_id,
                order.order_id,
                counters=progress.counters,
                incidents=incidents,
                gave_up=gave_up,
            )

        try:
            self._session.call(lambda session: report(session, progress.unreported))
        except InvalidInput as error:
            logger.warning("the server doesn't take a report of what went wrong: %s", error)
            if gave_up:
                self._session.call(lambda session: report(session, []))


def _measured_text(update: ClientUpdate) -> str:
    """Return an update's size and metrics in words, but for what the server doesn't admit."""
    metrics = update.metrics
    parts = [f"{update.num_examples} examples", f"{update.num_steps} steps"]
    if "train_s" in metrics:
        parts[-1] += f" in {metrics['train_s']:.1f} s"
    parts.append(f"loss {metrics['loss']:.4g}" if "loss" in metrics else "loss too large to report")
    if "accuracy" in metrics:
        parts.append(f"accuracy {metrics['accuracy']:.2%}")
    return ", ".join(parts)


def _answer_text(answer: UploadAnswer | None) -> str:
    """Return the server's answer to an update in words."""
    if answer is None:
        return "of a run the server doesn't know"
    if answer.receipt is Receipt.REFUSED:
        return f"refused: {answer.reason}"
    if answer.order_end is None:
        return answer.receipt.value
    word = "not needed" if answer.order_end in _UNNEEDED else "late"
    return f"{word}: {_ORDER_ENDS[answer.order_end]}"


def _order_label(order: WorkOrder) -> str:
    """Return the client and round of an order, for log lines."""
    return f"client {order.client_id}, round {order.round_number}"

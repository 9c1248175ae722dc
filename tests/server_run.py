"""A run of the server in one process, without a socket: the real resources, in a folder.

A test awaits what it is about (the client API, the collecting policy, the closer) and looks at the
store, the folders and the events. The clock of leases and stall rules is moved by hand.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedrounds.tensors.codec import decode_state, digest_bytes, encode_state
from fedrounds.types import MODEL_SECTION, ClientUpdate, Section, UploadAnswer, WorkOrder
from fedserver.composition import compose
from fedserver.models.checkpoints import GlobalModel
from fedserver.prepared import prepare
from fedserver.records import Attempt, Event
from fedserver.runtime import Threads
from fedserver.settings import ServerSettings
from fedserver.store import Store
from tests.factories import make_registration

NUM_EXAMPLES = 32
TICK_S = 0.05


class HandClock:
    """A monotonic clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


class ServerRun:
    """Owns a state-dir: a run of the task tests.tiny_task:tiny that begins, or goes on."""

    def __init__(self, folder: Path, **settings: Any) -> None:  # noqa: ANN401
        given: dict[str, Any] = {"task": "tests.tiny_task:tiny", "state_dir": folder}
        self.settings = ServerSettings(**(given | {"min_free_bytes": 0} | settings))
        prepared = prepare(self.settings)
        self.task = prepared.task
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.clock = HandClock()
        self.events: list[Event] = []
        self.session_ids: dict[int, str] = {}
        self.threads = Threads()
        self.store = Store(folder / "federation.sqlite")
        self.run = self.store.runs.latest_run() or self.store.runs.begin_run(
            self.settings.run_settings()
        )
        parts = compose(
            self.settings,
            prepared,
            run=self.run,
            store=self.store,
            threads=self.threads,
            clock=self.clock,
        )
        parts.bus.subscribe(self.events.append)
        self.recording = parts.store
        self.context = parts.context
        self.sessions = parts.sessions
        self.open_orders = parts.open_orders
        self.checkpoints = parts.checkpoints
        self.spool = parts.spool
        self.quarantine = parts.quarantine
        self.downloads = parts.downloads
        self.disk = parts.disk
        self.uploads = parts.uploads
        self.client_api = parts.client_api
        self.evaluations = parts.evaluations
        self.retention = parts.retention
        self.last_counted = parts.last_counted
        self.collecting = parts.collecting
        self.opener = parts.opener
        self.closer = parts.closer
        self._resume = parts.resume
        self.coordinator = parts.coordinator

    def close(self) -> None:
        """Give threads and files back, as the end of the process would."""
        self.threads.close()
        self.store.close()

    def kinds_of_events(self) -> list[str]:
        """Return the kinds of the events that were published, in order."""
        return [event.kind for event in self.events]

    def latest(self) -> Attempt:
        """Return the attempt with which the run goes on, as the store has it."""
        latest = self.store.rounds.latest_attempt(self.run.run_id)
        assert latest is not None
        return latest

    async def resume(self) -> tuple[Attempt, GlobalModel]:
        """Go on where the run is, or open its first round; see `fedserver.rounds.resuming`."""
        return await self._resume()

    async def register(self, *client_ids: int, num_examples: int = NUM_EXAMPLES) -> str:
        """Let a process that serves these clients register; returns its session's id."""
        registration = make_registration(
            *client_ids,
            instance_key=f"instance-{client_ids}",
            num_examples=(num_examples,) * len(client_ids),
        )
        return (await self.client_api.register(registration)).session_id

    async def go_on(self) -> tuple[Attempt, GlobalModel]:
        """Go on as the round loop does: it looks at the models before the first step."""
        current, base = await self.resume()
        assert await self.evaluations.take_bad_round(self.run.run_id) is None
        assert await self.evaluations.take_early_stop(self.run.run_id) is None
        return current, base

    async def begin(self, *client_ids: int) -> tuple[Attempt, GlobalModel]:
        """Register these clients, each by itself, and open the first round for them."""
        for client_id in client_ids:
            self.session_ids[client_id] = await self.register(client_id)
        return await self.go_on()

    async def finish_first_round(self, *client_ids: int) -> tuple[Attempt, Attempt]:
        """Let round 1 be done with the first client's update; returns it, and round 2."""
        opened, base = await self.begin(*client_ids)
        await self.answer(client_ids[0])
        following, _ = await self.closer.finish(await self.closer.close(opened), base)
        await self.evaluations.done()
        done = self.store.rounds.last_done_round(self.run.run_id)
        assert done is not None
        return done, following

    async def answer(
        self,
        client_id: int,
        *,
        shift: float = 0.01,
        **changes: Any,  # noqa: ANN401
    ) -> UploadAnswer:
        """Let a client pull its order and upload an update; see `payload_of` and `update_of`."""
        session_id = self.session_ids[client_id]
        work = await self.client_api.pull_work(session_id, wait_s=10)
        assert work.order is not None, f"client {client_id} has no open order"
        payload = self.payload_of(work.order, shift=shift)
        return await self.upload(session_id, work.order, payload, **changes)

    def states(self, current: Attempt) -> dict[int, str]:
        """Return the states of an attempt's orders in the store, by client id."""
        return {
            order.client_id: str(self.store.orders.find_order(order.order_id).state)
            for order in current.orders
        }

    def order_of(self, client_id: int) -> WorkOrder:
        """Return a client's order that is at work."""
        order = self.open_orders.open_order_of([client_id])
        assert order is not None, f"client {client_id} has no open order"
        return order.order

    def payload_of(self, order: WorkOrder, *, shift: float = 0.01) -> bytes:
        """Return an update's bytes: the model that its order began with, all weights shifted."""
        state = decode_state(self.checkpoints.path(order.sections[0].digest).read_bytes())
        return encode_state(
            {
                name: values + shift if values.is_floating_point() else values
                for name, values in state.items()
            }
        )

    async def upload(
        self,
        session_id: str,
        order: WorkOrder,
        payload: bytes,
        **changes: Any,  # noqa: ANN401
    ) -> UploadAnswer:
        """Upload a payload as one chunk; `changes` are of what the header says."""
        update = update_of(order, payload, **changes)
        return await self.client_api.upload(session_id, update, chunks_of(payload), offset=0)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[ServerRun]:  # noqa: ANN401
    """Give a run of the server in this folder, and close it."""
    server = ServerRun(folder, **settings)
    try:
        yield server
    finally:
        server.close()


def update_of(order: WorkOrder, payload: bytes, **changes: Any) -> ClientUpdate:  # noqa: ANN401
    """Return what an honest client's header says of a payload, some of it changed."""
    fields: dict[str, Any] = {
        "order_id": order.order_id,
        "digest": digest_bytes(payload),
        "size_bytes": len(payload),
        "sections": (Section(name=MODEL_SECTION, digest="", size_bytes=len(payload)),),
        "num_examples": NUM_EXAMPLES,
        "num_steps": 4,
        "metrics": {"loss": 0.5, "accuracy": 0.75},
    }
    return ClientUpdate(**(fields | changes))


async def chunks_of(*parts: bytes) -> AsyncIterator[memoryview]:
    """Yield these bytes as the chunks of a stream."""
    for part in parts:
        yield memoryview(part)


def non_finite(payload: bytes) -> bytes:
    """Return an update's bytes with a NaN in its first weight."""
    state = dict(decode_state(payload))
    name = next(name for name in state if name.endswith("weight"))
    values = state[name].clone()
    values.view(-1)[0] = torch.nan
    return encode_state(state | {name: values})

"""A federation in one process, without a socket: the server's and the clients' own code, by turns.

What is learned is a small logistic regression in float64, on data that differ between the clients,
with all of a client's data in each batch: few lines of plain PyTorch say what must come out.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedclient.progress import ProgressReporter
from fedclient.state import ClientStates
from fedclient.training import LocalSettings, OrderInputs, train_order
from fedrounds.diagnosis.values import Diagnosis, DoctorSettings
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tasks.task import Task, build_model, kinds_of
from fedrounds.tensors.codec import decode_state
from fedrounds.tensors.entries import tied_entries
from fedrounds.types import CONTROL_SECTION, ClientUpdate, WorkOrder
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.rounds.planning import work_orders
from fedserver.run_context import strategy_of
from fedserver.run_settings import compression_of, run_compression
from fedserver.settings import ServerSettings
from fedserver.updates.payload import update_file
from tests.factories import make_round

NUM_FEATURES = 4
NUM_CLASSES = 3


def examples_of(client_id: int) -> TensorDataset:
    """Return a client's data: float64 [n, 4] and labels, around a place of its own."""
    generator = torch.Generator().manual_seed(client_id)
    num_examples = 8 + 4 * client_id
    inputs = torch.randn(num_examples, NUM_FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (num_examples,), generator=generator)
    return TensorDataset(inputs + 0.5 * client_id, labels)


def gradient_of(client_id: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a client's mean loss, by plain autograd."""
    inputs, labels = examples_of(client_id).tensors
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    loss = F.cross_entropy(F.linear(inputs, leaves["weight"], leaves["bias"]), labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


small = Task(
    name="small",
    build_model=lambda: nn.Linear(NUM_FEATURES, NUM_CLASSES, dtype=torch.float64),
    load_train=lambda request: examples_of(0 if request.partition is None else 1),
    load_test=lambda _: None,
    loss=F.cross_entropy,
)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a client sent for an order, and where its payload lies."""

    order: WorkOrder
    update: ClientUpdate
    payload: Path


class SmallFederation:
    """Owns the folder: the server's models and the clients' payloads."""

    def __init__(self, folder: Path, *, task: Task = small, **settings: Any) -> None:  # noqa: ANN401
        given: dict[str, Any] = {"epochs": 5, "batch_size": 1000, "lr": 0.1, "momentum": 0.0}
        self.settings = ServerSettings(**(given | settings))
        self.strategy = strategy_of(self.settings)
        self.task = task
        self.round_number = 0
        self.diagnoses: list[Diagnosis] = []
        self._folder = folder
        torch.manual_seed(0)
        model = build_model(task)
        self.kinds, self.ties = kinds_of(task, model), tied_entries(model)
        self._checkpoints = Checkpoints(folder / "models", self.kinds)
        self.model: GlobalModel = self._checkpoints.save_initial(model.state_dict())
        self._last_counted: dict[int, str] = {}

    def kept_by(self, client_id: int, what: str) -> Mapping[str, Tensor]:
        """Return what is in force at a client under a name."""
        states = ClientStates(self._folder / f"states-{client_id}", run_id="run1")
        return states.promoted(self._last_counted.get(client_id, "")).tensors[what]

    @property
    def control(self) -> dict[str, Tensor]:
        """The server state of one moment, each tensor of its parameter's shape."""
        assert self.model.server_state is not None
        state = decode_state(self.model.server_state.file.path.read_bytes())
        return {name: tensor.squeeze(-1) for name, tensor in state.items()}

    @property
    def state(self) -> dict[str, Tensor]:
        """The global model's state_dict."""
        return decode_state(self.model.file.path.read_bytes())

    def play_round(self, clients: Sequence[int]) -> list[Sent]:
        """Ask these clients for an update each and make the next global model of them."""
        sent = [self.train(order) for order in self.open_round(clients)]
        self.close_round(sent)
        return sent

    def open_round(self, clients: Sequence[int]) -> list[WorkOrder]:
        """Return the orders of the next round."""
        self.round_number += 1
        opened = make_round(round_number=self.round_number, clients=clients)
        return work_orders(
            *(self.settings, opened, self.model, self._last_counted),
            algorithm=self.strategy.client_algorithm,
        )

    def train(self, order: WorkOrder, *, max_steps: int = 0) -> Sent:
        """Let a client work on its order."""
        payload = self._folder / f"{order.order_id}.draft"
        states = ClientStates(self._folder / f"states-{order.client_id}", run_id="run1")
        sections = {section.name: section.digest for section in order.sections}
        control = self._checkpoints.find(sections[CONTROL_SECTION]) if len(sections) > 1 else None
        update, kept = train_order(
            OrderInputs(
                order=order,
                task=self.task,
                examples=examples_of(order.client_id),
                global_model=self.model.file.path,
                state=states.promoted(order.last_counted_order_id),
                control=control,
                compression=run_compression(self.settings),
            ),
            LocalSettings(device=torch.device("cpu"), doctor=DoctorSettings(), max_steps=max_steps),
            progress=ProgressReporter(lambda *_: None, stop=threading.Event()),
            payload=payload,
            on_diagnosis=self.diagnoses.append,
        )
        states.keep(order.order_id, kept, follows=order.last_counted_order_id)
        return Sent(order=order, update=update, payload=payload)

    def file_of(self, sent: Sent) -> StateFile:
        """Return an update as the server reads it."""
        return update_file(
            sent.payload,
            base=self.model.file,
            kinds=self.kinds,
            compression=compression_of(self.settings, sent.update.encoding),
            sections=[(each.name, each.size_bytes) for each in sent.update.sections],
            num_examples=sent.update.num_examples,
            num_steps=sent.update.num_steps,
        )

    def close_round(self, counted: Sequence[Sent]) -> None:
        """Make the next global model of these updates."""
        state = self.model.server_state
        cohort = Cohort(
            base=self.model.file,
            updates=[self.file_of(sent) for sent in counted],
            kinds=self.kinds,
            ties=self.ties,
        )
        self.model = self._checkpoints.save(
            self.model.file,
            next_blocks(self.strategy, cohort, None if state is None else state.file),
            state_layout=state_layout(self.strategy, cohort),
        )
        self._last_counted |= {sent.order.client_id: sent.order.order_id for sent in counted}

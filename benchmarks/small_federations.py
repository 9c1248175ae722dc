"""A federation in one process, without gRPC, on models so small that a round takes milliseconds.

The service's own functions do the work: the orders, the clients' training with its algorithms and
its doctor, the payloads, the admission, the screening and the aggregation. What is left out are
the calls, the store and the clock.
"""

import dataclasses
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedclient.progress import ProgressReporter
from fedclient.state import ClientState
from fedclient.training import LocalSettings, NothingLearned, OrderInputs, train_order
from fedrounds.data import load_images
from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.doctor import TrainingHalted
from fedrounds.seeds import derive_seed
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.server_step import control_layout, next_blocks, state_layout
from fedrounds.tasks.task import Task
from fedrounds.tensors.codec import decode_state
from fedrounds.tensors.entries import entry_kinds
from fedrounds.tensors.payloads import write_payload
from fedrounds.types import CONTROL_SECTION, MODEL_SECTION, ClientUpdate, EntryKind, WorkOrder
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.phases import Phase
from fedserver.records import Adjustments, Attempt, Order, StoredUpdate
from fedserver.rounds.planning import admission_limits, work_orders
from fedserver.run_context import strategy_of
from fedserver.run_settings import compression_of, run_compression
from fedserver.settings import ServerSettings
from fedserver.updates.admission import validate_content, validate_control, validate_header
from fedserver.updates.payload import update_file
from fedserver.updates.screening import screen

State = Mapping[str, Tensor]

NUM_FEATURES, NUM_GROUPS = 30, 5
"""The inputs and the labels of the task "synthetic"."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Some clients, their data, and how they train; a seed draws all that is random in it.

    `ratio` is the largest client's number of examples over the smallest one's, of `smallest`
    examples. The sizes between are drawn evenly in the logarithm, or with `is_one_large` all but
    one client have `smallest`. `num_labels` is how many labels a client has (0: all). With
    `is_partial` each client ends each training after a drawn number of its steps. Each client's
    inputs are multiplied by a number drawn evenly in the logarithm from 1 / `input_scale` to
    `input_scale`. Of `num_mislabelled` clients every label is drawn anew. `num_apart` clients have
    the labels from 5 on for themselves, and the others those below. `settings` are the server's,
    beside the defaults.
    """

    name: str
    num_clients: int
    task: str = "digits"
    ratio: int = 1
    smallest: int = 30
    is_one_large: bool = False
    num_labels: int = 0
    is_partial: bool = False
    input_scale: float = 1.0
    num_mislabelled: int = 0
    num_apart: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def with_settings(self, settings: Mapping[str, Any]) -> "Federation":
        """Return the same federation under other settings of the server."""
        return dataclasses.replace(self, settings={**self.settings, **settings})


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs float32 [n, ...] and labels int64 [n]."""

    inputs: Tensor
    labels: Tensor

    def chosen(self, numbers: Sequence[int]) -> TensorDataset:
        """Return these examples as a data set."""
        wanted = torch.tensor(numbers)
        return TensorDataset(self.inputs[wanted], self.labels[wanted])


def digits(split: str) -> Examples:
    """Return the bundled digits at a quarter of their width and height, float32 [n, 1, 7, 7]."""
    data = load_images("mnist-sample", split)  # type: ignore[arg-type]  # a literal
    pixels = torch.from_numpy(data.images.copy()).float()[:, None] / 255
    pooled = F.avg_pool2d(pixels, 4)
    return Examples(
        inputs=(pooled - data.mean) / data.std, labels=torch.from_numpy(data.labels.copy())
    )


def multilayer() -> nn.Module:
    """Return a classifier of digits with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(49, 16), nn.ReLU(), nn.Linear(16, 10))


def normalised() -> nn.Module:
    """Return a convolutional classifier of digits with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        nn.Linear(6 * 25, 10),
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "digits": multilayer,
    "batchnorm": normalised,
    "synthetic": lambda: nn.Linear(NUM_FEATURES, NUM_GROUPS),
}


def task_of(federation: Federation) -> Task:
    """Return the task that a federation learns."""

    def load(_: object) -> None:
        return None

    return Task(
        name=federation.task,
        build_model=MODELS[federation.task],
        load_train=load,  # type: ignore[arg-type]  # train_order is given the examples
        load_test=load,
        loss=F.cross_entropy,
        num_classes=NUM_GROUPS if federation.task == "synthetic" else 10,
    )


def sizes_of(federation: Federation, draw: random.Random) -> list[int]:
    """Return how many examples each client has."""
    smallest, largest = federation.smallest, federation.smallest * federation.ratio
    if federation.is_one_large:
        return [smallest] * (federation.num_clients - 1) + [largest]
    between = [
        round(smallest * federation.ratio ** draw.random())
        for _ in range(federation.num_clients - 2)
    ]
    return [smallest, *between, largest]


def shares_of(federation: Federation, draw: random.Random) -> list[TensorDataset]:
    """Return each client's examples."""
    shares = _plain_shares(federation, draw)
    for number, share in enumerate(shares):
        inputs, labels = share.tensors
        inputs = inputs * federation.input_scale ** draw.uniform(-1, 1)
        if number < federation.num_mislabelled:
            labels = torch.tensor([draw.randrange(10) for _ in labels])
        shares[number] = TensorDataset(inputs, labels)
    return shares


def _plain_shares(federation: Federation, draw: random.Random) -> list[TensorDataset]:
    sizes = sizes_of(federation, draw)
    if federation.task == "synthetic":
        return [_synthetic_share(size, draw.getrandbits(32)) for size in sizes]
    pool = digits("train")
    by_label = [torch.nonzero(pool.labels == label).flatten().tolist() for label in range(10)]
    shares = []
    for number, size in enumerate(sizes):
        known = range(10)
        if federation.num_apart:
            known = range(5, 10) if number < federation.num_apart else range(5)
        labels = draw.sample(known, federation.num_labels or len(known))
        own = [number for label in labels for number in by_label[label]]
        shares.append(pool.chosen(draw.sample(own, min(size, len(own)))))
    return shares


def _synthetic_share(size: int, seed: int) -> TensorDataset:
    """Return a client's data as Synthetic(1, 1) of Li et al. 2020 (FedProx), appendix C.1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = normal(NUM_GROUPS, NUM_FEATURES) + normal(1)
    bias = normal(NUM_GROUPS) + normal(1)
    deviations = torch.arange(1, NUM_FEATURES + 1).pow(-0.6)
    inputs = normal(NUM_FEATURES) + normal(1) + deviations * normal(size, NUM_FEATURES)
    return TensorDataset(inputs, (inputs @ weights.T + bias).argmax(1))


@dataclass(kw_only=True)
class Attack:
    """What a `share` of the clients, at least the last one, sends instead of its updates.

    `change` takes the honest clients' deltas and their own, float32 [clients, parameters], and
    gives theirs. They register and report `claim` times the examples that they have.
    """

    share: float
    change: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    claim: int = 1


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An update, whether its round excluded it, and whether half the band would have."""

    stored: StoredUpdate
    is_attack: bool
    is_excluded: bool
    is_beyond_half: bool


@dataclass(frozen=True, kw_only=True)
class Given:
    """An order, the model it began with and the round it was given in."""

    order: WorkOrder
    base: GlobalModel
    given_in: Attempt


class Simulation:
    """One federation with its server's models, in a folder of its own."""

    def __init__(
        self,
        federation: Federation,
        folder: Path,
        *,
        seed: int,
        num_rounds: int,
        attack: Attack | None = None,
    ) -> None:
        draw = random.Random(derive_seed(seed, federation.name))
        self.federation = federation
        self.attack = attack
        self.task = task_of(federation)
        self.shares = shares_of(federation, draw)
        given = {
            "num_partitions": federation.num_clients,
            "seed": seed,
            "rounds": num_rounds,
            **federation.settings,
        }
        self.settings = ServerSettings(**given)
        self.strategy = strategy_of(self.settings)
        self.folder = folder
        self.draw = draw
        torch.manual_seed(derive_seed(seed, "init"))
        model = self.task.build_model()
        self.kinds = entry_kinds(model)
        self.checkpoints = Checkpoints(folder / "models", self.kinds)
        self.model = self.checkpoints.save_initial(model.state_dict())
        self.states: dict[int, tuple[str, ClientState]] = {}
        self.pending: dict[int, tuple[str, ClientState]] = {}
        self.at_work: list[Given] = []
        self.counted: dict[int, list[StoredUpdate]] = {}
        self.number = 0

    def play(self) -> Iterator[list[Judged]]:
        """Play all rounds; yield each round's updates as they were judged."""
        while self.number < self.settings.rounds:
            self.number += 1
            yield self._round()

    def _round(self) -> list[Judged]:
        opened = self._opened()
        orders = work_orders(
            *(self.settings, opened, self.model),
            {client: order_id for client, (order_id, _) in self.states.items()},
            algorithm=self.strategy.client_algorithm,
        )
        self.at_work += [Given(order=order, base=self.model, given_in=opened) for order in orders]
        trained = [(given, update) for given in self._arriving() if (update := self._train(given))]
        stored = [
            (given, self._admitted(given, update)) for given, update in self._attacked(trained)
        ]
        excluded, beyond_half = (
            self._screened(opened, [stored_update for _, stored_update in stored], factor=factor)
            for factor in (1.0, 0.5)
        )
        counted = [pair for pair in stored if pair[1].update.order_id not in excluded]
        if counted:
            self._aggregate(counted)
        self.counted[self.number] = [stored_update for _, stored_update in counted]
        for given, _ in counted:
            self.states[given.order.client_id] = self.pending[given.order.client_id]
        for path in self.folder.glob("run1-*"):
            path.unlink()
        for digest in self.checkpoints.digests() - self._needed():
            self.checkpoints.drop(digest)
        return [
            Judged(
                stored=stored_update,
                is_attack=self._is_attacker(stored_update.client_id),
                is_excluded=stored_update.update.order_id in excluded,
                is_beyond_half=stored_update.update.order_id in beyond_half,
            )
            for _, stored_update in stored
        ]

    def _opened(self) -> Attempt:
        busy = {given.order.client_id for given in self.at_work}
        idle = [
            client_id for client_id in range(self.federation.num_clients) if client_id not in busy
        ]
        size = 0 if self.strategy.buffer_size else self.settings.clients_per_round
        cohort = sorted(self.draw.sample(idle, size)) if size else idle
        return Attempt(
            run_id="run1",
            round_number=self.number,
            attempt=1,
            phase=Phase.COLLECTING,
            base_digest=self.model.digest,
            base_bytes=self.model.file.layout.size_bytes,
            max_delta_norm=100 * (1 + self.model.parameter_norm),
            orders=tuple(
                Order(
                    order_id=f"run1-r{self.number}-a1-c{client_id}-s1",
                    client_id=client_id,
                    num_examples=self._registered(client_id),
                )
                for client_id in cohort
            ),
        )

    def _registered(self, client_id: int) -> int:
        size = len(self.shares[client_id])
        return size * self.attack.claim if self._is_attacker(client_id) and self.attack else size

    def _is_attacker(self, client_id: int) -> bool:
        if self.attack is None:
            return False
        num_clients = self.federation.num_clients
        return client_id >= num_clients - max(1, round(self.attack.share * num_clients))

    def _arriving(self) -> list[Given]:
        """Take from those at work whoever comes into this round, by client id."""
        size = self.strategy.buffer_size
        arrived = self.draw.sample(self.at_work, size) if size else self.at_work
        self.at_work = [given for given in self.at_work if given not in arrived]
        return sorted(arrived, key=lambda given: given.order.client_id)

    def _train(self, given: Given) -> ClientUpdate | None:
        """Return a client's update for an order; None where it gave up, as a client would."""
        order = given.order
        _, state = self.states.get(order.client_id, ("", ClientState()))
        share = self.shares[order.client_id]
        max_steps = 0
        if self.federation.is_partial:
            per_epoch = math.ceil(len(share) / order.training.batch_size)
            max_steps = self.draw.randint(1, order.training.epochs * per_epoch)
        control = None
        if len(order.sections) > 1:
            control = self.checkpoints.find(order.sections[1].digest)
        try:
            update, kept = self._trained(given, share, state, control, max_steps)
        except (TrainingHalted, NothingLearned):
            return None
        self.pending[order.client_id] = (order.order_id, kept)
        return update

    def _trained(
        self,
        given: Given,
        share: TensorDataset,
        state: ClientState,
        control: Path | None,
        max_steps: int,
    ) -> tuple[ClientUpdate, ClientState]:
        return train_order(
            OrderInputs(
                order=given.order,
                task=self.task,
                examples=share,
                global_model=given.base.file.path,
                state=state,
                control=control,
                compression=run_compression(self.settings),
            ),
            LocalSettings(device=torch.device("cpu"), doctor=DoctorSettings(), max_steps=max_steps),
            progress=ProgressReporter(lambda *_: None, stop=threading.Event()),
            payload=self._payload(given),
            on_diagnosis=lambda _: None,
        )

    def _payload(self, given: Given) -> Path:
        return self.folder / given.order.order_id

    def _attacked(
        self, trained: Sequence[tuple[Given, ClientUpdate]]
    ) -> list[tuple[Given, ClientUpdate]]:
        """Put into the attackers' payloads what they send instead."""
        is_bad = [self._is_attacker(given.order.client_id) for given, _ in trained]
        if self.attack is None or not any(is_bad):
            return list(trained)
        deltas, bad = (
            torch.stack([self._delta(given) for given, _ in trained]),
            torch.tensor(is_bad),
        )
        generator = torch.Generator().manual_seed(self.draw.getrandbits(32))
        changed = iter(self.attack.change(deltas[~bad], deltas[bad], generator))
        return [
            (given, self._replaced(given, update, next(changed)) if attacks else update)
            for (given, update), attacks in zip(trained, is_bad, strict=True)
        ]

    def _delta(self, given: Given) -> Tensor:
        """Return an update's delta of the parameters, float32 [parameters]."""
        sent, base = decode_state(self._payload(given).read_bytes()), self._base(given)
        return torch.cat([(sent[name] - base[name]).flatten() for name in self._parameters()])

    def _base(self, given: Given) -> State:
        return decode_state(given.base.file.path.read_bytes())

    def _parameters(self) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind is EntryKind.PARAMETER]

    def _replaced(self, given: Given, update: ClientUpdate, delta: Tensor) -> ClientUpdate:
        assert self.attack is not None
        sent, base = dict(decode_state(self._payload(given).read_bytes())), self._base(given)
        begin = 0
        for name in self._parameters():
            size = base[name].numel()
            sent[name] = base[name] + delta[begin : begin + size].view_as(base[name])
            begin += size
        sections = write_payload(self._payload(given), {MODEL_SECTION: sent})
        claim = self.attack.claim
        return dataclasses.replace(
            update,
            digest=sections[0].digest,
            sections=sections,
            size_bytes=sections[0].size_bytes,
            num_examples=update.num_examples * claim,
            num_steps=update.num_steps * claim,
        )

    def _admitted(self, given: Given, update: ClientUpdate) -> StoredUpdate:
        """Admit an update as the server does when it arrives."""
        limits = admission_limits(self.settings, given.given_in, strategy=self.strategy)
        validate_header(update, given.base.file, limits)
        file = self._file(given, update)
        if CONTROL_SECTION in file.others:
            expected = control_layout(given.base.file.layout, self.kinds)
            validate_control(file.others[CONTROL_SECTION], expected=expected, limits=limits)
        norm = validate_content(
            file,
            base=given.base.file,
            kinds=self.kinds,
            limits=limits,
        )
        staleness = self.number - given.given_in.round_number
        return StoredUpdate(
            client_id=given.order.client_id,
            update=update,
            delta_norm=norm,
            num_registered=self._registered(given.order.client_id),
            own_base=given.base.digest if staleness else None,
            staleness=staleness,
        )

    def _file(self, given: Given, update: ClientUpdate) -> StateFile:
        is_stale = given.base.digest != self.model.digest
        return update_file(
            self._payload(given),
            base=self.model.file,
            kinds=self.kinds,
            compression=compression_of(self.settings, update.encoding),
            sections=[(section.name, section.size_bytes) for section in update.sections],
            num_examples=update.num_examples,
            num_steps=update.num_steps,
            global_loss=update.metrics.get("global_loss"),
            own_base=given.base.file.path if is_stale else None,
            staleness=self.number - given.given_in.round_number,
        )

    def _screened(
        self, opened: Attempt, stored: Sequence[StoredUpdate], *, factor: float
    ) -> set[str]:
        """Return the orders whose updates are excluded where the band is `factor` as wide."""
        exclusions = screen(
            dataclasses.replace(opened, adjustments=Adjustments(norm_band_factor=factor)),
            stored,
            before=self.counted,
            settings=self.settings,
            model_norm=self.model.parameter_norm,
            trusted=(),
        )
        return {exclusion.order_id for exclusion in exclusions}

    def _aggregate(self, counted: Sequence[tuple[Given, StoredUpdate]]) -> None:
        state = self.model.server_state
        cohort = Cohort(
            base=self.model.file,
            updates=[self._file(given, stored_update.update) for given, stored_update in counted],
            kinds=self.kinds,
            seed=self.number,
        )
        self.model = self.checkpoints.save(
            self.model.file,
            next_blocks(self.strategy, cohort, None if state is None else state.file),
            state_layout=state_layout(self.strategy, cohort),
        )

    def _needed(self) -> set[str | None]:
        models = [self.model, *(given.base for given in self.at_work)]
        return {digest for model in models for digest in (model.digest, model.state_digest)}

    def accuracy(self) -> float:
        """Return the global model's share of right answers on the bundled test digits."""
        model = self.task.build_model().eval()
        model.load_state_dict(decode_state(self.model.file.path.read_bytes()))
        test = digits("test")
        with torch.no_grad():
            return float((model(test.inputs).argmax(1) == test.labels).float().mean())

"""Builders of values with sane defaults: a test names only what it is about."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Oddity,
    Origin,
    Remedy,
    RemedyKind,
    StepPhase,
    SuspectSample,
    Symptom,
    TrendPoint,
)
from fedrounds.strategies.blocks import StateFile
from fedrounds.strategies.components import Requirement, no_requirement
from fedrounds.tensors.codec import digest_bytes, encode_state, read_layout
from fedrounds.types import (
    MODEL_SECTION,
    NO_COMPRESSION,
    ClientUpdate,
    Compression,
    Encoding,
    Registration,
    Section,
    TrainingConfig,
    WorkOrder,
)
from fedserver.phases import OrderEvent, OrderState, Phase
from fedserver.records import Arrival, Attempt, Event, Order, Refusal, Run, Session, StoredUpdate
from fedserver.store import Store
from fedserver.updates.admission import AdmissionLimits

State = Mapping[str, Tensor]

DIGEST = "ab" * 32


class TinyNet(nn.Module):
    """A model whose state_dict has an entry of every kind.

    fc.weight and fc.bias are parameters and head.weight is tied to fc.weight; norm.running_mean and
    norm.running_var are float buffers, norm.num_batches_tracked a counter; steps (int32) and mask
    (bool) are fixed.
    """

    steps: Tensor
    mask: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3, dtype=dtype)
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.head = nn.Linear(3, 3, bias=False, dtype=dtype)
        self.head.weight = self.fc.weight
        self.register_buffer("steps", torch.arange(4, dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False, True]))


def make_event(kind: str = "something", *, round_number: int | None = 1, attempt: int = 1) -> Event:
    """Return an event that happens now."""
    return Event(kind=kind, occurred_at=time.time(), round_number=round_number, attempt=attempt)


def make_order(order_id: str = "run1-r1-a1-c0-s1", *, client_id: int = 0) -> WorkOrder:
    """Return an order of round 1."""
    return WorkOrder(
        order_id=order_id,
        client_id=client_id,
        round_number=1,
        attempt=1,
        sections=(Section(name=MODEL_SECTION, digest=DIGEST, size_bytes=100),),
        training=TrainingConfig(),
        seed=1,
    )


def make_round(
    run_id: str = "run1",
    *,
    round_number: int = 1,
    attempt: int = 1,
    clients: Sequence[int] = (0, 1),
    base_digest: str = DIGEST,
) -> Attempt:
    """Return a round that begins to collect, with an order for each client."""
    return Attempt(
        run_id=run_id,
        round_number=round_number,
        attempt=attempt,
        phase=Phase.COLLECTING,
        base_digest=base_digest,
        base_bytes=1000,
        max_delta_norm=10.0,
        orders=tuple(
            Order(
                order_id=f"{run_id}-r{round_number}-a{attempt}-c{client_id}-s1", client_id=client_id
            )
            for client_id in clients
        ),
    )


def make_update(
    order_id: str = "run1-r1-a1-c0-s1",
    *,
    payload: bytes = b"payload",
    size_bytes: int | None = None,
    num_examples: int = 10,
    num_steps: int = 2,
    metrics: Mapping[str, float] | None = None,
    section: str = MODEL_SECTION,
    encoding: Encoding = Encoding.STATE_DICT,
) -> ClientUpdate:
    """Return what a client says of `payload`."""
    digest = digest_bytes(payload)
    size = len(payload) if size_bytes is None else size_bytes
    return ClientUpdate(
        order_id=order_id,
        digest=digest,
        size_bytes=size,
        sections=(Section(name=section, digest=digest, size_bytes=size),),
        num_examples=num_examples,
        num_steps=num_steps,
        metrics={"accuracy": 0.5, "loss": 1.25} if metrics is None else metrics,
        encoding=encoding,
    )


def make_limits(
    *,
    max_num_examples: int = 1000,
    max_delta_norm: float = 10.0,
    max_steps_per_example: int = 2,
    compression: Compression = NO_COMPRESSION,
    unmet: Requirement = no_requirement,
) -> AdmissionLimits:
    """Return the bounds of a round."""
    return AdmissionLimits(
        max_num_examples=max_num_examples,
        max_delta_norm=max_delta_norm,
        max_steps_per_example=max_steps_per_example,
        compression=compression,
        unmet=unmet,
    )


def make_registration(
    *client_ids: int,
    instance_key: str = "key",
    num_examples: tuple[int, ...] = (),
    process_key: str = "",
) -> Registration:
    """Return what a client process says of itself; by default it serves client 0."""
    return Registration(
        client_ids=client_ids or (0,),
        instance_key=instance_key,
        software_version="0.1.0",
        num_examples=num_examples,
        process_key=process_key,
    )


def make_session(
    *client_ids: int, session_id: str = "session", instance_key: str = "key"
) -> Session:
    """Return a session whose clients have declared how much data they have."""
    ids = client_ids or (0,)
    return Session(
        session_id=session_id,
        instance_key=instance_key,
        client_ids=ids,
        num_examples=tuple(10 for _ in ids),
        software_version="0.1.0",
    )


def write_state(folder: Path, state: State, *, num_examples: int = 0) -> StateFile:
    """Write a state_dict as the server keeps it."""
    encoded = encode_state(state)
    path = folder / f"{digest_bytes(encoded)}-{num_examples}.state"
    path.write_bytes(encoded)
    return StateFile(path=path, layout=read_layout(path), num_examples=num_examples)


def begin_round(
    store: Store, *, clients: Sequence[int] = (0, 1), base_digest: str = DIGEST
) -> tuple[Run, Attempt]:
    """Begin a run and open its first round."""
    run = store.runs.begin_run({"rounds": 3})
    opened = make_round(run.run_id, clients=clients, base_digest=base_digest)
    store.rounds.open_round(opened, make_event("round-opened"))
    return run, opened


def record_arrival(
    store: Store,
    run: Run,
    update: ClientUpdate,
    order_event: OrderEvent = OrderEvent.STORE,
    *,
    reason: str | None = None,
    kept_bytes: int = 0,
) -> tuple[OrderState, bool]:
    """Apply an event to an order with the update it rests on; see `Orders.record_arrival`."""
    refusal = None if reason is None else Refusal(reason=reason, evidence={"kind": "test"})
    return store.orders.record_arrival(
        run.run_id,
        Arrival(
            update=update,
            order_event=order_event,
            refusal=refusal,
            delta_norm=1.0,
            kept_bytes=kept_bytes,
        ),
    )


def store_updates(store: Store, run: Run, opened: Attempt) -> list[StoredUpdate]:
    """Record an update for every order of a round; returns what the round rests on."""
    for order in opened.orders:
        record_arrival(store, run, make_update(order.order_id, payload=order.order_id.encode()))
    return store.orders.stored_updates(opened)


def make_diagnosis(**changes: Any) -> Diagnosis:  # noqa: ANN401
    """Return a diagnosis with something in every field, some of it changed."""
    nan = float("nan")
    made = Diagnosis(
        symptom=Symptom.NON_FINITE_LOSS,
        cause=Cause.BAD_DATA,
        step=17,
        noticed_at_step=18,
        epoch=2,
        batch=5,
        batch_size=8,
        lr=0.05,
        origin=Origin(
            phase=StepPhase.FORWARD,
            module="1",
            operation="native_batch_norm",
            tensor="1.weight",
            dtype="float32",
            shape=(8, 16),
            num_nan=4,
            num_inf=2,
            first_index=(0, 3),
        ),
        samples=(
            SuspectSample(position=2, index=40, oddity=Oddity.NAN, value=3.0),
            SuspectSample(position=7, oddity=Oddity.NAN, value=1.0),
        ),
        num_samples=2,
        experiments=(
            Experiment(name=ExperimentName.UNCHANGED, is_healed=False, loss=nan, failed_at_step=17),
            Experiment(name=ExperimentName.WITHOUT_SAMPLES, is_healed=True, loss=0.75),
            Experiment(name=ExperimentName.LOWER_RATE, is_healed=True, value=0.5, loss=0.5),
        ),
        contributing=(ExperimentName.LOWER_RATE,),
        trend=(
            TrendPoint(step=16, loss=0.5, grad_norm=1.5, largest_weight=2.5, lr=0.05),
            TrendPoint(step=17, loss=nan, grad_norm=float("inf"), largest_weight=2.5, lr=0.05),
        ),
        remedy=Remedy(kind=RemedyKind.DROP_SAMPLES, value=4.0, oddity=Oddity.NAN, is_working=True),
        returned_to_step=12,
        num_replayed_steps=31,
        seconds=0.25,
        detail={"largest_input": float("-inf")},
    )
    return replace(made, **changes)

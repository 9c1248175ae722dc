"""A server's state-dir as it is after a run, for tests that damage it or look at it."""

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fedclient.update_encoding import encode_update
from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tensors.codec import decode_state, encode_state
from fedrounds.tensors.entries import entry_kinds
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.phases import OrderEvent
from fedserver.records import Attempt
from fedserver.run_context import strategy_of
from fedserver.run_settings import run_compression, strategy_seed
from fedserver.settings import ServerSettings
from fedserver.store import Store
from fedserver.updates.payload import update_file
from fedserver.updates.spool import Spool
from fedserver.verification.verify import verify
from tests.factories import make_event, make_round, make_update, record_arrival
from tests.tiny_task import tiny

NUM_ROUNDS = 4
CLIENTS = (0, 1)
BAD_CLIENT = 2
BAD_ROUND = 2


class StateDir:
    """A server's state-dir after a run of NUM_ROUNDS rounds whose updates are all kept.

    In round BAD_ROUND the update of BAD_CLIENT was refused and lies in quarantine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = ""

    def path(self, folder: str, *, client: int | None = None, round_number: int) -> Path:
        """Return the file of a client's update in a round, or without a client of its model."""
        if client is None:
            digest = self.ask("SELECT model_digest FROM rounds WHERE round = ?", round_number)
            return self.folder / folder / f"{digest}.safetensors"
        (path,) = (self.folder / folder).glob(f"{self.run_id}-r{round_number}-a1-c{client}-*")
        return path

    def ask(self, query: str, *values: object) -> str:
        """Return one value from the database, or change something in it, past the software."""
        connection = sqlite3.connect(self.folder / "federation.sqlite")
        result = connection.execute(query, values)
        answer = result.fetchone()[0] if result.description else str(result.rowcount)
        connection.commit()
        connection.close()
        return str(answer)

    def change(self, query: str, *values: object) -> None:
        """Change rows of the database past the software; there must be some to change."""
        assert int(self.ask(query, *values)) > 0

    def verify(self, *, round_number: int | None = None) -> tuple[list[str], str]:
        """Return the findings and the summary."""
        findings: list[str] = []
        store = Store(self.folder / "federation.sqlite", read_only=True)
        runs = store.runs.all_runs()
        verdict = verify(store, self.folder, runs, round_number=round_number, tell=findings.append)
        store.close()
        assert verdict.num_findings == len(findings)
        return findings, verdict.summary


def write_state_dir(
    folder: Path,
    *,
    task: str = "tests.tiny_task:tiny",
    strategy: str = "fedavg",
    compression: Literal["none", "int8"] = "none",
) -> StateDir:
    """Write what a server leaves behind."""
    made = StateDir(folder)
    model = tiny.build_model()
    kinds = entry_kinds(model)
    checkpoints, spool = Checkpoints(folder / "models", kinds), Spool(folder / "spool")
    (folder / "quarantine").mkdir()
    store = Store(folder / "federation.sqlite")
    settings = ServerSettings(strategy=strategy, task=task, lr=0.1, compression=compression)
    run = store.runs.begin_run(settings.run_settings())
    made.run_id = run.run_id
    base = checkpoints.save_initial(model.state_dict())
    current: Attempt | None = _round(run.run_id, 1, base)
    assert current is not None
    store.rounds.open_round(current, make_event("round-opened"))
    while current is not None:
        counted = []
        for order in current.orders:
            state = decode_state(checkpoints.path(base.digest).read_bytes())
            noise = torch.Generator().manual_seed(current.round_number * 10 + order.client_id)
            for name in ("0.weight", "3.weight"):
                state[name] += torch.randn(state[name].shape, generator=noise)
            encoded = encode_update(
                state,
                global_model=base.file.path,
                kinds=kinds,
                compression=run_compression(settings),
                seed=order.client_id,
                residual={},
            )
            payload = encode_state(encoded.tensors)
            update = make_update(
                order.order_id,
                payload=payload,
                num_examples=10 + 3 * order.client_id,
                encoding=run_compression(settings).encoding,
            )
            if order.client_id == BAD_CLIENT:
                path = folder / "quarantine" / f"{order.order_id}.{update.digest}"
                record_arrival(
                    *(store, run, update, OrderEvent.REFUSE),
                    reason="its norm is absurd",
                    kept_bytes=len(payload),
                )
            else:
                path = spool.path(order.order_id, update.digest)
                record_arrival(store, run, update)
                counted.append((path, update))
            path.write_bytes(payload)
        store.rounds.close_round(
            current, make_event("round-closed", round_number=current.round_number)
        )
        cohort = Cohort(
            base=base.file,
            updates=[
                update_file(
                    path,
                    base=base.file,
                    kinds=kinds,
                    compression=run_compression(settings),
                    sections=[(each.name, each.size_bytes) for each in update.sections],
                    num_examples=update.num_examples,
                    num_steps=update.num_steps,
                )
                for path, update in counted
            ],
            kinds=kinds,
            seed=strategy_seed(settings, current.round_number, current.attempt),
        )
        made_by = strategy_of(settings)
        before = None if base.server_state is None else base.server_state.file
        base = checkpoints.save(
            base.file,
            next_blocks(made_by, cohort, before),
            state_layout=state_layout(made_by, cohort),
        )
        number = current.round_number + 1
        following = _round(run.run_id, number, base) if number <= NUM_ROUNDS else None
        events = [make_event("round-done", round_number=current.round_number)]
        if following is not None:
            events.append(make_event("round-opened", round_number=number))
        store.rounds.finish_round(
            current,
            model_digest=base.digest,
            state_digest=base.state_digest,
            next_round=following,
            events=events,
        )
        current = following
    store.close()
    return made


def _round(run_id: str, number: int, base: GlobalModel) -> Attempt:
    clients = (*CLIENTS, BAD_CLIENT) if number == BAD_ROUND else CLIENTS
    opened = make_round(run_id, round_number=number, clients=clients, base_digest=base.digest)
    return replace(opened, base_state_digest=base.state_digest)

"""Promise 4: the same bytes for any arrival order of the updates and any number of threads.

Ordinary values round the difference away, so the values here are chosen to show it: in each place
one client sends +1e30, another -1e30, a third 1 and a fourth a subnormal. What is left of the small
ones depends on whether the large ones have cancelled yet.
"""

import functools
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import digest_bytes, encode_state
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints
from fedserver.phases import OrderState
from fedserver.store import Store
from fedserver.updates.spool import Spool
from tests.factories import begin_round, make_update, record_arrival, write_state

NUM_ELEMENTS = 1_000_003
WEIGHTS = (3, 5, 3, 5)
"""Clients two apart have equal weights, so that their +1e30 and -1e30 cancel."""

KINDS = {"w": EntryKind.PARAMETER}
FEDAVG = find_strategy("fedavg")

# What a server does with a recorded round; each argument is a folder and a number of threads.
AGGREGATE = """
import sys
from pathlib import Path
import torch
from fedserver.models.checkpoints import Checkpoints
from fedserver.updates.spool import Spool
from fedserver.store import Store
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import read_layout
from fedrounds.tensors.entries import EntryKind

kinds = {"w": EntryKind.PARAMETER}
for argument in sys.argv[1:]:
    folder, threads = Path(argument.partition("@")[0]), int(argument.partition("@")[2])
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    store, spool = Store(folder / "federation.sqlite"), Spool(folder / "spool")
    checkpoints = Checkpoints(folder / "models", kinds)
    collected = store.rounds.latest_attempt(store.runs.latest_run().run_id)
    updates = []
    for stored in store.orders.stored_updates(collected):
        path = spool.path(stored.update.order_id, stored.update.digest)
        weight = stored.update.num_examples
        updates.append(StateFile(path=path, layout=read_layout(path), num_examples=weight))
    base = checkpoints.load(collected.base_digest).file
    cohort = Cohort(base=base, updates=updates, kinds=kinds)
    blocks = next_blocks(find_strategy("fedavg"), cohort)
    print(checkpoints.save(base, blocks).digest)
    store.close()
"""


@functools.cache
def client_values(client: int) -> Tensor:
    """Return what a client sends: the pattern, shifted by one place a client, then noise."""
    pattern = torch.tensor([1e30, 1.0, -1e30, 1e-40])
    places = (torch.arange(NUM_ELEMENTS) + client) % 4
    values = pattern[places]
    generator = torch.Generator().manual_seed(client)
    values[-100_000:] = torch.randn(100_000, generator=generator)
    return values


def mean_in_arrival_order(arrival: Sequence[int], *, dtype: torch.dtype) -> str:
    """Return the digest of the obvious mean: fractional weights, added as updates arrive."""
    total = torch.zeros(NUM_ELEMENTS, dtype=dtype)
    for client in arrival:
        total += client_values(client).to(dtype) * (WEIGHTS[client] / sum(WEIGHTS))
    return digest_bytes(encode_state({"w": total.float()}))


def record_round(folder: Path, arrival: Sequence[int]) -> None:
    """Record a round whose updates arrive in this order, as the server does."""
    folder.mkdir()
    base = Checkpoints(folder / "models", KINDS).save_initial({"w": torch.zeros(NUM_ELEMENTS)})
    store, spool = Store(folder / "federation.sqlite"), Spool(folder / "spool")
    run, opened = begin_round(store, clients=range(4), base_digest=base.digest)
    orders = {order.client_id: order.order_id for order in opened.orders}
    for client in arrival:
        payload = encode_state({"w": client_values(client)})
        update = make_update(orders[client], payload=payload, num_examples=WEIGHTS[client])
        with spool.open_stream(update.order_id, update.digest, offset=0) as stream:
            stream.append(memoryview(payload))
            stream.make_durable()
        assert record_arrival(store, run, update)[0] is OrderState.STORED
    assert [update.client_id for update in store.orders.stored_updates(opened)] == [0, 1, 2, 3]
    store.close()


def test_the_aggregate_depends_neither_on_arrival_nor_on_threads(tmp_path: Path) -> None:
    """Three arrival orders, each aggregated with 1, 2 or 3 threads: one digest, the formula's.

    The control proves that these values can tell orders apart: added as they arrive, the same
    updates give other bytes, in float32 and even in float64.
    """
    arrivals = [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]]
    for dtype in (torch.float32, torch.float64):
        controls = {mean_in_arrival_order(arrival, dtype=dtype) for arrival in arrivals}
        assert len(controls) == 3, f"the values can't tell arrival orders apart in {dtype}"

    places = []
    for threads, arrival in enumerate(arrivals, start=1):
        record_round(tmp_path / str(threads), arrival)
        places.append(f"{tmp_path / str(threads)}@{threads}")
    server = subprocess.run(
        [sys.executable, "-c", AGGREGATE, *places], stdout=subprocess.PIPE, text=True, check=True
    )
    digests = server.stdout.split()

    expected = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    for client, weight in enumerate(WEIGHTS):
        expected += weight * client_values(client).double()
    expected /= sum(WEIGHTS)
    formula = digest_bytes(encode_state({"w": expected.float()}))
    assert digests == [formula] * 3


def test_the_store_hands_updates_out_by_client_however_they_arrived(tmp_path: Path) -> None:
    """Many shuffled arrivals, one order of aggregation."""
    seen = set()
    for number in range(6):
        store = Store(tmp_path / f"{number}.sqlite")
        run, opened = begin_round(store, clients=(7, 10, 2, 33, 100))
        orders = list(opened.orders)
        random.Random(number).shuffle(orders)
        for order in orders:
            record_arrival(store, run, make_update(order.order_id, num_examples=order.client_id))
        seen.add(tuple(update.client_id for update in store.orders.stored_updates(opened)))
        store.close()
    assert seen == {(2, 7, 10, 33, 100)}


def test_thread_counts_agree_in_bfloat16(tmp_path: Path) -> None:
    """One thread and three in one process give the formula's bytes; the control, another order's.

    (Of float16's few exponents float64 adds all without rounding: there no order can show.)
    """
    values = [client_values(client_id).bfloat16() for client_id in range(4)]

    def mean(clients: Sequence[int]) -> Tensor:
        total = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        for client in clients:
            total += WEIGHTS[client] * values[client].double()
        return (total / sum(WEIGHTS)).bfloat16()

    expected = mean(range(4))
    assert not torch.equal(expected, mean([0, 2, 1, 3])), "the values can't tell orders apart"
    base = write_state(tmp_path, {"w": torch.zeros_like(values[0])})
    updates = [
        write_state(tmp_path, {"w": value}, num_examples=weight)
        for value, weight in zip(values, WEIGHTS, strict=True)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cohort = Cohort(base=base, updates=updates, kinds=KINDS)
            blocks = [block.values for block in next_blocks(FEDAVG, cohort)]
            assert torch.equal(torch.cat(blocks), expected), threads
    finally:
        torch.set_num_threads(before)

"""Both sides of the Flower app: FedAvg over clients that add to every tensor and train nothing.

Runs in Flower's environment, so it imports nothing of ours. The model is that of
benchmarks/tasks.py: float32 tensors of a million elements, the rest, and two more elements.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

_TENSOR_ELEMENTS = 1_000_000
_INITIAL = 0.5
_STEP = 1e-3
_ROUND_TIMEOUT_S = 3600.0


def initial_model(num_bytes: int) -> list[np.ndarray]:
    """Return tensors of about `num_bytes` bytes, every element _INITIAL."""
    whole, rest = divmod(max(1, num_bytes // 4), _TENSOR_ELEMENTS)
    sizes = [_TENSOR_ELEMENTS] * whole + ([rest] if rest else []) + [2]
    return [np.full(size, _INITIAL, dtype=np.float32) for size in sizes]


def train(message: Message, context: Context) -> Message:
    """Give back the model with _STEP added to every element."""
    changed = [array + np.float32(_STEP) for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict(
        {"arrays": ArrayRecord(changed), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content=content, reply_to=message)


def run_rounds(grid: Grid, context: Context) -> None:
    """Run the rounds, check what came out, and write seconds and memory to `results` as JSON."""
    num_bytes = int(context.run_config["num-bytes"])
    num_clients = int(context.run_config["num-clients"])
    num_rounds = int(context.run_config["num-rounds"])
    began = initial_model(num_bytes)
    ended_s: list[float] = []

    def note_the_time(server_round: int, arrays: ArrayRecord) -> None:
        # Called before the first round and after each.
        ended_s.append(time.monotonic())

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        # FedAvg goes on without the clients that failed; so count those that answered.
        train_metrics_aggr_fn=lambda answers, _: MetricRecord({"clients": len(answers)}),
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(began),
        num_rounds=num_rounds,
        timeout=_ROUND_TIMEOUT_S,
        train_config=ConfigRecord(),
        evaluate_fn=note_the_time,
    )
    clients = {
        at: int(metrics["clients"]) for at, metrics in result.train_metrics_clientapp.items()
    }
    expected_clients = dict.fromkeys(range(1, num_rounds + 1), num_clients)
    assert clients == expected_clients, f"clients that answered, by round: {clients}"
    final = result.arrays.to_numpy_ndarrays()
    assert [array.shape for array in final] == [array.shape for array in began]
    assert all(array.dtype == np.float32 for array in final)
    expected = _INITIAL + num_rounds * _STEP
    error = max(float(np.abs(array - expected).max()) for array in final)
    assert error < _STEP / 10, f"elements should be {expected}, are off by up to {error}"
    results = Path(str(context.run_config["results"]))
    written = results.with_suffix(".tmp")
    written.write_text(json.dumps({"ended_s": ended_s, "peak_mb": peak_mb()}))
    written.replace(results)


def peak_mb() -> float:
    """Return this process's largest resident memory so far, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


server = ServerApp()
server.main()(run_rounds)
client = ClientApp()
client.train()(train)

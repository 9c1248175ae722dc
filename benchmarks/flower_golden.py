"""What Flower makes of a few updates: golden values that a test of the strategies compares with.

    python benchmarks/flower_golden.py > tests/unit/strategies/flower_golden.json

Run it with the Python of an environment that holds Flower (`pip install flwr==1.42.0`): it can't
stand beside this project, since it wants protobuf below 7. Nothing of this project is imported.
Each rule gets the same updates, each a model of two layers, flattened in the file.
"""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, QFedAvg
from flwr.server.strategy.aggregate import (
    aggregate,
    aggregate_bulyan,
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)

Vector = npt.NDArray[np.float64]
Layers = list[Vector]

NUM_UPDATES = 13
NUM_BAD = 2
SIZE = 17
NUM_ROUNDS = 4
LOSS = 1.75
LOCAL_LR = 0.25
LATE = 10**9
"""A round so late that Adam's correction for its beginning, which this project's hasn't, is 1."""

_CUT = 5


def main() -> None:
    """Write inputs and results to standard output."""
    generator = np.random.default_rng(11)
    updates = np.round(1 + 0.5 * generator.standard_normal((NUM_UPDATES, SIZE)), 6)
    updates[-NUM_BAD:] -= 6
    base = np.round(generator.standard_normal(SIZE), 6)
    num_examples = [int(number) for number in generator.integers(1, 100, NUM_UPDATES)]
    weighted = [
        (_layers(update), weight) for update, weight in zip(updates, num_examples, strict=True)
    ]
    alike = [(_layers(update), 1) for update in updates]
    aggregates = {
        "fedavg": aggregate(weighted),
        "median": aggregate_median(weighted),
        "trimmed-mean": aggregate_trimmed_avg(weighted, 0.2),
        "krum": aggregate_krum(weighted, NUM_BAD, 0),
        # Flower weighs what it keeps by num_examples.
        "multi-krum": aggregate_krum(alike, NUM_BAD, 6),
        "bulyan": aggregate_bulyan(list(alike), NUM_BAD, aggregate_krum, to_keep=0),
        "qfedavg": _qfedavg(base, updates),
    }
    start = {"initial_parameters": ndarrays_to_parameters(_layers(base))}
    tau = 0.05
    adaptive = {"eta": 0.1, "tau": tau, **start}
    optimizers: Mapping[str, Any] = {
        "fedavgm": FedAvgM(server_learning_rate=0.5, server_momentum=0.8, **start),
        "fedadagrad": FedAdagrad(**adaptive),
        "fedadam": FedAdam(beta_1=0.8, beta_2=0.95, **adaptive),
        "fedyogi": FedYogi(beta_1=0.8, beta_2=0.95, **adaptive),
    }
    rounds = {
        name: _rounds(optimizer, base, updates, num_examples, tau=tau)
        for name, optimizer in optimizers.items()
    }
    golden = {
        "made": f"python benchmarks/flower_golden.py, flwr {version('flwr')}",
        "base": base.tolist(),
        "updates": updates.tolist(),
        "num_examples": num_examples,
        "aggregates": {name: _flat(layers).tolist() for name, layers in aggregates.items()},
        "rounds": {name: [model.tolist() for model in models] for name, models in rounds.items()},
    }
    json.dump(golden, sys.stdout)
    print()


def _layers(vector: Vector) -> Layers:
    return [vector[:_CUT].copy(), vector[_CUT:].reshape(3, -1).copy()]


def _flat(layers: Layers) -> Vector:
    return np.concatenate([np.ravel(layer) for layer in layers])


def _results(updates: list[Vector], num_examples: list[int]) -> list[tuple[Any, FitRes]]:
    return [
        (
            None,
            FitRes(
                status=Status(Code.OK, ""),
                parameters=ndarrays_to_parameters(_layers(update)),
                num_examples=weight,
                metrics={},
            ),
        )
        for update, weight in zip(updates, num_examples, strict=True)
    ]


def _qfedavg(base: Vector, updates: Vector) -> Layers:
    """Flower takes one loss, the server's, for all clients."""
    evaluate: Callable[..., tuple[float, dict[str, Any]]] = lambda *_: (LOSS, {})  # noqa: E731
    strategy = QFedAvg(q_param=2.0, qffl_learning_rate=LOCAL_LR, evaluate_fn=evaluate)
    strategy.pre_weights = _layers(base)
    parameters, _ = strategy.aggregate_fit(1, _results(list(updates), [1] * len(updates)), [])
    assert parameters is not None
    layers: Layers = parameters_to_ndarrays(parameters)
    return layers


def _rounds(
    strategy: Any,  # noqa: ANN401
    base: Vector,
    updates: Vector,
    num_examples: list[int],
    *,
    tau: float,
) -> list[Vector]:
    """Three clients a round, which add their update's tenth to the model they are given."""
    model, models = base, []
    if not isinstance(strategy, FedAvgM):
        # Flower's v begins at 0, the paper's at tau^2.
        strategy.v_t = [np.full_like(layer, tau**2) for layer in _layers(base)]
    for number in range(NUM_ROUNDS):
        chosen = range(3 * number, 3 * number + 3)
        sent = [model + 0.1 * updates[index] for index in chosen]
        late = LATE if isinstance(strategy, FedAdam) else 0
        parameters, _ = strategy.aggregate_fit(
            1 + number + late, _results(sent, [num_examples[index] for index in chosen]), []
        )
        model = _flat(parameters_to_ndarrays(parameters))
        models.append(model)
    return models


if __name__ == "__main__":
    main()

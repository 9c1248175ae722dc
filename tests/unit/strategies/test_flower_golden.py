"""Strategies beside Flower's: what it made of the same updates, kept as golden values.

Flower can't be installed beside this project; benchmarks/flower_golden.py says how they were made.
Where the definitions differ: Flower weighs what Multi-Krum keeps by num_examples, gives q-FedAvg
one loss for all clients, begins v at 0, and corrects FedAdam for its beginning; the golden values
were made where that makes no difference.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedrounds.strategies import StrategySettings
from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tensors.codec import decode_state
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints
from tests.factories import write_state

Vectors = npt.NDArray[np.float64]

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("flower_golden.json").read_text())
KINDS = {"w": EntryKind.PARAMETER}
LOSS = 1.75
LOCAL_LR = 0.25


def state_of(values: Vectors) -> dict[str, torch.Tensor]:
    """Return a model of one tensor."""
    return {"w": torch.from_numpy(values.copy())}


def own_strategy(strategy: str, parameters: dict[str, float]) -> Any:  # noqa: ANN401
    """Return the strategy."""
    return find_strategy(
        strategy,
        parameters,
        settings=StrategySettings(lr=LOCAL_LR, momentum=0.0, evaluate_on_clients=True),
    )


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        ("fedavg", {}),
        ("median", {}),
        ("trimmed-mean", {"trim": 0.2}),
        ("krum", {"f": 2}),
        ("multi-krum", {"f": 2, "keep": 6}),
        ("bulyan", {"f": 2}),
        ("qfedavg", {"q": 2}),
    ],
)
def test_an_aggregator_is_flowers(
    tmp_path: Path, strategy: str, parameters: dict[str, float]
) -> None:
    """Within 1e-12; q-FedAvg within 1e-9, since Flower adds 1e-10 to every loss."""
    updates = [
        replace(
            write_state(tmp_path, state_of(np.array(update)), num_examples=weight), global_loss=LOSS
        )
        for update, weight in zip(GOLDEN["updates"], GOLDEN["num_examples"], strict=True)
    ]
    base = write_state(tmp_path, state_of(np.array(GOLDEN["base"])))
    cohort = Cohort(base=base, updates=updates, kinds=KINDS)
    (block,) = next_blocks(own_strategy(strategy, parameters), cohort)
    distance = np.abs(block.values.numpy() - np.array(GOLDEN["aggregates"][strategy])).max()
    assert distance < (1e-9 if strategy == "qfedavg" else 1e-12)


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        ("fedavgm", {"server_lr": 0.5, "server_momentum": 0.8}),
        ("fedadagrad", {"server_lr": 0.1, "tau": 0.05}),
        ("fedadam", {"server_lr": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 0.05}),
        ("fedyogi", {"server_lr": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 0.05}),
    ],
)
def test_a_server_optimizer_is_flowers(
    tmp_path: Path, strategy: str, parameters: dict[str, float]
) -> None:
    """Over four rounds of three clients that weigh differently, moments carried on."""
    optimizer = own_strategy(strategy, parameters)
    checkpoints = Checkpoints(tmp_path / "models", KINDS)
    model = checkpoints.save_initial(state_of(np.array(GOLDEN["base"])))
    for number, expected in enumerate(GOLDEN["rounds"][strategy]):
        before = decode_state(model.file.path.read_bytes())["w"].numpy()
        updates = [
            write_state(
                tmp_path,
                state_of(before + 0.1 * np.array(GOLDEN["updates"][position])),
                num_examples=GOLDEN["num_examples"][position],
            )
            for position in range(3 * number, 3 * number + 3)
        ]
        cohort = Cohort(base=model.file, updates=updates, kinds=KINDS)
        state = model.server_state.file if model.server_state else None
        model = checkpoints.save(
            model.file,
            next_blocks(optimizer, cohort, state),
            state_layout=state_layout(optimizer, cohort),
        )
        after = decode_state(model.file.path.read_bytes())["w"].numpy()
        assert np.abs(after - np.array(expected)).max() < 1e-11

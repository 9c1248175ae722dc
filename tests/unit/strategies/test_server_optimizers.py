"""Server optimizers beside torch.optim and the paper's lines, and what their state is."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrounds.errors import NotFound, StorageDamaged
from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tensors.codec import decode_state
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints, GlobalModel, NonFiniteAggregate
from tests.factories import State, write_state

KINDS = {"norm.running_mean": EntryKind.MEAN, "w": EntryKind.PARAMETER}
SIZE = 7
NUM_ROUNDS = 5

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def deltas_of(round_number: int, dtype: torch.dtype) -> list[Tensor]:
    """Return what two clients change in a round."""
    generator = torch.Generator().manual_seed(round_number)
    return [0.1 * torch.randn(SIZE, generator=generator).to(dtype) for _ in range(2)]


def run_rounds(
    folder: Path,
    strategy: str,
    parameters: Mapping[str, float],
    *,
    dtype: torch.dtype = torch.float64,
    num_rounds: int = NUM_ROUNDS,
) -> tuple[list[Tensor], list[Tensor], GlobalModel]:
    """Run rounds of two clients that count alike; returns models, pseudo-gradients, the last."""
    rule = find_strategy(strategy, parameters)
    checkpoints = Checkpoints(folder / "models", KINDS)
    model = checkpoints.save_initial(
        {"norm.running_mean": torch.zeros(2, dtype=dtype), "w": torch.ones(SIZE, dtype=dtype)}
    )
    models, gradients = [], []
    for number in range(num_rounds):
        base = decode_state(model.file.path.read_bytes())
        deltas = deltas_of(number, dtype)
        updates = [
            write_state(
                folder,
                {
                    "norm.running_mean": torch.full((2,), number, dtype=dtype),
                    "w": base["w"] + delta,
                },
                num_examples=3,
            )
            for delta in deltas
        ]
        cohort = Cohort(base=model.file, updates=updates, kinds=KINDS)
        model = checkpoints.save(
            model.file,
            next_blocks(rule, cohort, model.server_state.file if model.server_state else None),
            state_layout=state_layout(rule, cohort),
        )
        models.append(decode_state(model.file.path.read_bytes())["w"])
        sent = [base["w"] + delta for delta in deltas]
        gradients.append((sent[0] + sent[1]) / 2 - base["w"])
    return models, gradients, model


# Where definitions agree: torch's Adam corrects for its beginning and has no v0, so it doesn't; its
# Adagrad has no momentum.
IN_TORCH: list[tuple[str, dict[str, float], Optimizer]] = [
    (
        "fedavgm",
        {"server_lr": 0.5, "server_momentum": 0.9},
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    ),
    (
        "fedavgm",
        {"server_momentum": 0.8, "nesterov": 1},
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.8, nesterov=True),
    ),
    (
        "fedavgm",
        {"server_lr": 0.3, "server_momentum": 0},
        lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    ),
    (
        "fedadagrad",
        {"server_lr": 0.2, "tau": 0.05},
        lambda parameters: torch.optim.Adagrad(
            parameters, lr=0.2, initial_accumulator_value=0.05**2, eps=0.05
        ),
    ),
]


@pytest.mark.parametrize(
    ("strategy", "parameters", "optimizer"),
    IN_TORCH,
    ids=[f"{name} {parameters}" for name, parameters, _ in IN_TORCH],
)
def test_an_optimizer_is_torchs_where_definitions_agree(
    tmp_path: Path, strategy: str, parameters: dict[str, float], optimizer: Optimizer
) -> None:
    """Over five rounds, with minus the pseudo-gradient as the gradient."""
    models, gradients, _ = run_rounds(tmp_path, strategy, parameters)
    weights = torch.ones(SIZE, dtype=torch.float64)
    reference = optimizer([weights])
    for model, gradient in zip(models, gradients, strict=True):
        weights.grad = -gradient
        reference.step()
        assert (model - weights).abs().max() < 1e-12


def adaptive(
    gradients: list[Tensor], rule: str, *, lr: float, beta1: float, beta2: float, tau: float
) -> list[Tensor]:
    """Return the models of Reddi et al. 2021, algorithm 2, element by element."""
    x, m, v = np.ones(SIZE), np.zeros(SIZE), np.full(SIZE, tau**2)
    models = []
    for gradient in gradients:
        for index, delta in enumerate(gradient.tolist()):
            m[index] = beta1 * m[index] + (1 - beta1) * delta
            if rule == "fedadagrad":
                v[index] += delta**2
            elif rule == "fedyogi":
                v[index] -= (1 - beta2) * delta**2 * np.sign(v[index] - delta**2)
            else:
                v[index] = beta2 * v[index] + (1 - beta2) * delta**2
            x[index] += lr * m[index] / (v[index] ** 0.5 + tau)
        models.append(torch.from_numpy(x.copy()))
    return models


@pytest.mark.parametrize("strategy", ["fedadagrad", "fedadam", "fedyogi"])
def test_an_adaptive_optimizer_is_algorithm_2(tmp_path: Path, strategy: str) -> None:
    """Beside the paper's lines written out; beta1 given to all, beta2 where it exists."""
    parameters = {"server_lr": 0.03, "beta1": 0.8, "tau": 0.01}
    if strategy != "fedadagrad":
        parameters["beta2"] = 0.95
    models, gradients, _ = run_rounds(tmp_path, strategy, parameters)
    expected = adaptive(gradients, strategy, lr=0.03, beta1=0.8, beta2=0.95, tau=0.01)
    for model, reference in zip(models, expected, strict=True):
        assert (model - reference).abs().max() < 1e-12


def test_the_first_step_by_hand(tmp_path: Path) -> None:
    """Nothing corrects the beginning: m = 0.1 delta, v = 0.99 tau^2 + 0.01 delta^2."""
    models, gradients, _ = run_rounds(tmp_path, "fedadam", {"tau": 0.1}, num_rounds=1)
    delta = gradients[0]
    move = 0.1 * (0.1 * delta) / ((0.99 * 0.01 + 0.01 * delta**2).sqrt() + 0.1)
    assert (models[0] - 1 - move).abs().max() < 1e-15


def test_the_state_is_a_file_beside_the_model(tmp_path: Path) -> None:
    """Moments of parameters alone, in float32, named by their content, readable by any tool."""
    _, gradients, model = run_rounds(
        tmp_path, "fedadam", {"tau": 0.01}, dtype=torch.float32, num_rounds=1
    )
    assert model.server_state is not None
    path = model.server_state.file.path
    assert path == tmp_path / "models" / f"{model.server_state.digest}.server-state"
    (name,) = load_file(path)
    moments = load_file(path)[name]
    assert (name, moments.dtype, moments.shape) == ("w", torch.float32, (SIZE, 2))
    delta = gradients[0]
    expected = torch.stack([0.1 * delta, 0.99 * 1e-4 + 0.01 * delta**2], dim=1)
    assert torch.allclose(moments, expected, rtol=1e-5)


def test_an_optimizer_leaves_running_statistics_alone(tmp_path: Path) -> None:
    """Float buffers are the plain mean, whatever the optimizer does with parameters."""
    _, _, model = run_rounds(tmp_path, "fedyogi", {"server_lr": 9})
    state = decode_state(model.file.path.read_bytes())
    assert state["norm.running_mean"].tolist() == [NUM_ROUNDS - 1] * 2


def test_many_blocks_make_the_state_of_a_single_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is written in the order of the model's blocks, whatever their size."""
    _, _, whole = run_rounds(tmp_path / "whole", "fedadam", {})
    monkeypatch.setattr("fedrounds.strategies.blocks.BLOCK_ELEMENTS", 3)
    _, _, cut = run_rounds(tmp_path / "cut", "fedadam", {})
    assert (cut.digest, cut.state_digest) == (whole.digest, whole.state_digest)


def test_a_state_that_is_not_finite_is_no_state(tmp_path: Path) -> None:
    """A square beyond float32 fails the step, though the model itself is finite."""
    base: State = {"w": torch.zeros(2)}
    kinds = {"w": EntryKind.PARAMETER}
    start = write_state(tmp_path, base)
    update = write_state(tmp_path, {"w": torch.full((2,), 1e25)}, num_examples=1)
    cohort = Cohort(base=start, updates=[update], kinds=kinds)
    rule = find_strategy("fedadam")
    checkpoints = Checkpoints(tmp_path / "models", kinds)
    with pytest.raises(NonFiniteAggregate, match="server state of tensor 'w'"):
        checkpoints.save(start, next_blocks(rule, cohort), state_layout=state_layout(rule, cohort))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_state_is_examined_before_it_is_used(tmp_path: Path) -> None:
    """As the model: other bytes are damage, and a missing state is an error."""
    _, _, model = run_rounds(tmp_path, "fedavgm", {}, num_rounds=1)
    assert model.server_state is not None
    checkpoints = Checkpoints(tmp_path / "models", KINDS)
    loaded = checkpoints.load(model.digest, state_digest=model.state_digest)
    assert loaded.server_state == model.server_state
    path = model.server_state.file.path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageDamaged, match="other bytes than its name says"):
        checkpoints.load(model.digest, state_digest=model.state_digest)
    assert checkpoints.digests() == {path.stem for path in (tmp_path / "models").iterdir()}
    checkpoints.drop(model.server_state.digest)
    with pytest.raises(NotFound, match="no server state"):
        checkpoints.load(model.digest, state_digest=model.state_digest)

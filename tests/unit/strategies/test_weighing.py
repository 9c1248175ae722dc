"""Means that weigh by more than num_examples: q-FedAvg and FedNova beside their papers' lines."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedrounds.strategies import StrategySettings
from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.components import UnfitCohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.types import EntryKind
from tests.factories import write_state

KINDS = {"norm.running_var": EntryKind.MEAN, "w": EntryKind.PARAMETER}
EXAMPLES = (30, 10, 60)
STEPS = (5, 40, 12)
LOSSES = (0.2, 2.5, 0.9)
SIZE = 41

Vectors = npt.NDArray[np.float64]


def values(seed: int) -> Vectors:
    """Return a model's parameters."""
    return np.random.default_rng(seed).standard_normal(SIZE)


BASE, UPDATES = values(0), [values(seed) for seed in (1, 2, 3)]


def aggregate(
    folder: Path,
    strategy: str,
    *,
    parameters: dict[str, float] | None = None,
    losses: Sequence[float | None] = LOSSES,
    steps: Sequence[int] = STEPS,
    momentum: float = 0.0,
) -> tuple[Vectors, float]:
    """Return the next parameters, and a running variance that is 1, 2 and 3 at the clients."""

    def state(vector: Vectors, variance: float) -> dict[str, torch.Tensor]:
        return {"norm.running_var": torch.tensor(variance), "w": torch.from_numpy(vector)}

    updates = [
        replace(
            write_state(folder, state(vector, number + 1.0), num_examples=EXAMPLES[number]),
            num_steps=steps[number],
            global_loss=losses[number],
        )
        for number, vector in enumerate(UPDATES)
    ]
    cohort = Cohort(base=write_state(folder, state(BASE, 0.0)), updates=updates, kinds=KINDS)
    settings = StrategySettings(lr=0.05, momentum=momentum, evaluate_on_clients=True)
    rule = find_strategy(strategy, parameters, settings=settings)
    entries = {block.block.name: block.values for block in next_blocks(rule, cohort)}
    return entries["w"].numpy(), entries["norm.running_var"].item()


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("lipschitz", [0.0, 3.0])
def test_qfedavg_is_the_papers_algorithm(tmp_path: Path, q: float, lipschitz: float) -> None:
    """Li et al. 2020, algorithm 2, lines 5 to 7, with L = 1 / lr unless it is given."""
    smoothness = lipschitz or 1 / 0.05
    deltas, steps = [], []
    for update, loss in zip(UPDATES, LOSSES, strict=True):
        move = smoothness * (BASE - update)
        deltas.append(loss**q * move)
        steps.append(q * loss ** (q - 1) * (move**2).sum() + smoothness * loss**q)
    expected = BASE - np.sum(deltas, axis=0) / sum(steps)
    aggregated, variance = aggregate(
        tmp_path, "qfedavg", parameters={"q": q, "lipschitz": lipschitz}
    )
    assert np.abs(aggregated - expected).max() < 1e-12
    # 30, 10 and 60 examples with 1, 2 and 3.
    assert variance == pytest.approx(2.3)


def test_qfedavg_with_q_0_is_the_uniform_mean(tmp_path: Path) -> None:
    """All clients count alike, as the paper's FedAvg does."""
    aggregated, _ = aggregate(tmp_path, "qfedavg", parameters={"q": 0})
    assert np.abs(aggregated - np.mean(UPDATES, axis=0)).max() < 1e-12


def test_qfedavg_with_q_0_needs_no_particular_loss(tmp_path: Path) -> None:
    """A loss of nothing, and one of which 1 / F is beyond float64, weigh as any other."""
    aggregated, _ = aggregate(tmp_path, "qfedavg", parameters={"q": 0}, losses=(0.0, 1e-310, 3.0))
    assert np.abs(aggregated - np.mean(UPDATES, axis=0)).max() < 1e-12


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_qfedavg_takes_a_loss_of_0(tmp_path: Path, q: float) -> None:
    """Its client doesn't ask for a move, but shortens the others'.

    For q = 1 as 0^0 is 1; below 1 the slope at 0 is infinite, and taken at 1e-10 instead.
    """
    losses = (0.2, 0.0, 0.9)
    smoothness = 1 / 0.05
    deltas, steps = [], []
    for update, loss in zip(UPDATES, losses, strict=True):
        move = smoothness * (BASE - update)
        deltas.append(loss**q * move)
        slope = q * (1e-10 if q < 1 and loss == 0 else loss) ** (q - 1)
        steps.append(slope * (move**2).sum() + smoothness * loss**q)
    expected = BASE - np.sum(deltas, axis=0) / sum(steps)
    aggregated, _ = aggregate(tmp_path, "qfedavg", parameters={"q": q}, losses=losses)
    assert np.abs(aggregated - expected).max() < 1e-12


@pytest.mark.parametrize("q", [1.0, 2.0])
def test_qfedavg_stays_where_nobody_has_a_loss(tmp_path: Path, q: float) -> None:
    """All losses are 0: the model is as good as it gets, and 0 / 0 isn't computed."""
    aggregated, variance = aggregate(
        tmp_path, "qfedavg", parameters={"q": q}, losses=(0.0, 0.0, 0.0)
    )
    assert np.abs(aggregated - BASE).max() < 1e-12
    assert variance == pytest.approx(2.3)


@pytest.mark.parametrize(("q", "loss"), [(2, 1e200), (10, 1e31)])
def test_qfedavg_names_a_loss_beyond_its_powers(tmp_path: Path, q: float, loss: float) -> None:
    """F^q isn't a number that weights can be made of."""
    sentence = f"with q {q:g} has no weight for a loss of the global model of {loss:g}"
    with pytest.raises(UnfitCohort, match=re.escape(sentence)):
        aggregate(tmp_path, "qfedavg", parameters={"q": q}, losses=(0.2, loss, 0.9))


@pytest.mark.parametrize("lipschitz", [1e160, 1e300])
def test_qfedavg_with_an_absurd_lipschitz_is_a_sentence(tmp_path: Path, lipschitz: float) -> None:
    """L^2, or what it is multiplied with, is beyond float64."""
    with pytest.raises(UnfitCohort, match="beyond what float64 holds"):
        aggregate(tmp_path, "qfedavg", parameters={"lipschitz": lipschitz})


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -1.0])
def test_qfedavg_without_a_loss_is_a_sentence(tmp_path: Path, loss: float | None) -> None:
    """A client that reports no loss, or a number that can't be a loss, can't be weighed."""
    with pytest.raises(UnfitCohort, match="needs each client's loss of the global model"):
        aggregate(tmp_path, "qfedavg", losses=(0.2, loss, 0.9))


def reach_of_sgd(num_steps: int, momentum: float) -> float:
    """Return how far torch's SGD moves with a rate of 1 while the gradient stays at -1."""
    weight = torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
    for _ in range(num_steps):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    return weight.item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_the_papers_equation(tmp_path: Path, momentum: float) -> None:
    """Wang et al. 2020, equation 7: d_i = delta_i / |a_i|, tau = sum p_i |a_i|; |a_i| by torch."""
    reaches = np.array([reach_of_sgd(steps, momentum) for steps in STEPS])
    shares = np.array(EXAMPLES) / sum(EXAMPLES)
    tau = sum(shares * reaches)
    normalised = [(update - BASE) / reach for update, reach in zip(UPDATES, reaches, strict=True)]
    expected = BASE + tau * sum(p * share for p, share in zip(shares, normalised, strict=True))
    aggregated, variance = aggregate(tmp_path, "fednova", momentum=momentum)
    assert np.abs(aggregated - expected).max() < 1e-12
    assert variance == pytest.approx(2.3)


def test_fednova_of_equal_steps_is_fedavg(tmp_path: Path) -> None:
    """Nothing to normalise: the weighted mean."""
    aggregated, _ = aggregate(tmp_path, "fednova", steps=(7, 7, 7), momentum=0.9)
    expected, _ = aggregate(tmp_path, "fedavg", steps=(7, 7, 7))
    assert np.abs(aggregated - expected).max() < 1e-12


def test_fednova_without_steps_is_a_sentence(tmp_path: Path) -> None:
    """A client that claims not to have moved can't be normalised."""
    with pytest.raises(UnfitCohort, match="divides by the local steps"):
        aggregate(tmp_path, "fednova", steps=(7, 0, 7))

"""An optimizer's own constants that no training is stable with are known and changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from fedrounds.diagnosis.values import Cause, RemedyKind
from fedrounds.doctor import Doctor
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.constants import make_stable, unstable_constant

Make = Callable[[list[nn.Parameter]], Optimizer]


def weights() -> list[nn.Parameter]:
    """Return a weight of 1."""
    return [nn.Parameter(torch.ones(1))]


def size_after(optimizer: Optimizer, weight: nn.Parameter, *, num_steps: int = 40) -> float:
    """Return how large a weight is after steps without any gradient but the optimizer's own."""
    for _ in range(num_steps):
        weight.grad = torch.zeros(1)
        optimizer.step()
    return float(weight.detach().abs())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda w: SGD(w, lr=0.1, momentum=1.9), 1.9),
        (lambda w: SGD(w, lr=0.1, momentum=0.99, weight_decay=1e-4), None),
        (lambda w: SGD(w, lr=0.05, weight_decay=60.0), 3.0),
        (lambda w: SGD(w, lr=0.05, weight_decay=39.0), None),
        # 3.5 is below 2 (1 + 0.9) = 3.8, and 4 above it.
        (lambda w: SGD(w, lr=0.5, momentum=0.9, weight_decay=7.0), None),
        (lambda w: SGD(w, lr=0.5, momentum=0.9, weight_decay=8.0), 4.0),
        (lambda w: AdamW(w, lr=0.1, weight_decay=30.0), 3.0),
        (lambda w: NAdam(w, lr=0.1, weight_decay=30.0, decoupled_weight_decay=True), 3.0),
        (lambda w: Adam(w, lr=0.1, weight_decay=30.0), None),
        (lambda w: RMSprop(w, lr=0.1, weight_decay=30.0), None),
        (lambda w: Adagrad(w, lr=0.1, weight_decay=30.0), None),
    ],
)
def test_a_constant_is_unstable_where_a_weight_grows_by_itself(
    make: Make, expected: float | None
) -> None:
    """Momentum needs a push to grow; the decay is such a push."""
    assert unstable_constant(make(weights())) == (
        None if expected is None else pytest.approx(expected)
    )
    weight = weights()
    if expected != 1.9:
        grows = size_after(make(weight), weight[0]) > 1.0
        assert grows == (expected is not None)


def test_stable_constants_are_the_usual_momentum_and_no_decay() -> None:
    optimizer = SGD(weights(), lr=0.5, momentum=1.0, weight_decay=8.0)
    make_stable(optimizer)
    assert unstable_constant(optimizer) is None
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    usual = SGD(weights(), lr=0.5, momentum=0.5, weight_decay=1e-4)
    before = dict(usual.param_groups[0])
    make_stable(usual)
    assert dict(usual.param_groups[0]) == before


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error."""
    assert isinstance(batch, tuple)
    return functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize(("momentum", "decay"), [(1.9, 0.0), (0.0, 60.0)])
def test_a_training_with_an_unstable_constant_is_healed(momentum: float, decay: float) -> None:
    """The user's own constants are in the optimizer still: only steps are taken otherwise."""
    torch.manual_seed(0)
    inputs = torch.randn(100, 16, 4)
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=decay)
    doctor = Doctor(model, optimizer, compute_loss)
    losses = [
        doctor.step((features, features.sum(dim=1, keepdim=True))).loss for features in inputs
    ]
    doctor.finish()
    (diagnosis,) = doctor.diagnoses
    assert diagnosis.cause in (Cause.LEARNING_RATE, Cause.OPTIMIZER_STATE)
    assert diagnosis.remedy.kind is RemedyKind.RESET_OPTIMIZER
    assert diagnosis.remedy.is_working
    assert losses[-1] < 1e-3 * losses[0]
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (momentum, decay)

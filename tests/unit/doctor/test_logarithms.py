"""Losses written so that they overflow have their stable form's value and gradient when guarded."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.doctor.guarded import guarding

Function = Callable[[Tensor], Tensor]
INPUTS = torch.tensor([[300.0, -2.0, 0.5], [-400.0, 1.0, 90.0]])
LOG_2 = math.log(2)


def value_and_gradient(function: Function, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value, and its gradient."""
    leaf = inputs.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


FORMS: dict[str, tuple[Function, Function]] = {
    "log cosh": (
        lambda x: x.cosh().log().mean(),
        lambda x: (x.abs() + F.softplus(-2 * x.abs()) - LOG_2).mean(),
    ),
    "softplus": (lambda x: torch.log(1 + x.exp()).sum(), lambda x: F.softplus(x).sum()),
    "softplus by log1p": (lambda x: x.exp().log1p().sum(), lambda x: F.softplus(x).sum()),
    "log of a mean": (
        lambda x: torch.log(x.exp().mean(1)).sum(),
        lambda x: (x.logsumexp(1) - math.log(3)).sum(),
    ),
    "softmax by hand": (
        lambda x: (x.exp() / x.exp().sum(1, keepdim=True))[:, 1].sum(),
        lambda x: x.softmax(1)[:, 1].sum(),
    ),
    "log of 1 - sigmoid": (
        lambda x: (1 - x.sigmoid()).log().sum(),
        lambda x: F.logsigmoid(-x).sum(),
    ),
    "mixture": (
        lambda x: -torch.log((x.softmax(1) * (-x.square()).exp() / (2 * x.exp())).sum(1)).sum(),
        lambda x: -torch.logsumexp(x.log_softmax(1) - x.square() - LOG_2 - x, 1).sum(),
    ),
    "root and square": (
        lambda x: torch.log(x.exp().sqrt() * x.exp().square()).sum(),
        lambda x: (2.5 * x).sum(),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_loss_has_its_stable_forms_value_and_gradient(name: str) -> None:
    naive, stable = FORMS[name]
    with guarding():
        actual = value_and_gradient(naive, INPUTS)
    for value, wanted in zip(actual, value_and_gradient(stable, INPUTS), strict=True):
        torch.testing.assert_close(value, wanted)


def test_a_factor_that_isnt_positive_has_no_logarithm() -> None:
    """The product is computed as it is written: log(-2 * e) isn't a number, and is kept off."""
    with guarding():
        product = torch.tensor([-2.0]) * torch.ones(1).exp()
        assert product.log().tolist() == [torch.tensor(torch.finfo(torch.float32).eps).log()]


GUARDED: dict[str, Function] = {
    "poles of lgamma": lambda x: torch.lgamma(x.relu()).sum(),
    "a mask times NaN": lambda x: (
        (x - torch.tensor([1.0, math.nan, 2.0])).square() * torch.tensor([True, False, True])
    ).sum(),
    "infinity minus infinity": lambda x: (
        (x + torch.tensor([math.inf, 0.0, 0.0])) - torch.tensor([math.inf, 0.0, 0.0])
    ).sum(),
    "an operation without a guard": lambda x: (torch.special.i0(x) + x).sum(),
    "eigenvalues that are equal": lambda x: (
        torch.linalg.eigh(torch.eye(3) * x[1, 1])[1].pow(3).sum() + x.sum()
    ),
    "a class weight of 1 / 0": lambda x: F.cross_entropy(
        x, torch.tensor([0, 1]), weight=torch.tensor([1.0, 1.0, math.inf]), label_smoothing=0.1
    ),
    "a masked class and label smoothing": lambda x: F.cross_entropy(
        x.masked_fill(torch.tensor([False, False, True]), -math.inf),
        torch.tensor([0, 1]),
        label_smoothing=0.1,
    ),
    "no alignment": lambda x: (
        F.ctc_loss(
            x.log_softmax(1)[:, None],
            torch.tensor([[1, 2, 1]]),
            torch.tensor([2]),
            torch.tensor([3]),
        )
        + x.sum()
    ),
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_term_off_the_map_takes_nothing_from_the_others(name: str) -> None:
    """The value and the gradient are finite, and the gradient isn't zero throughout."""
    leaf = INPUTS.clone().requires_grad_()
    plain = GUARDED[name](leaf)
    (gradient,) = torch.autograd.grad(plain, leaf)
    assert not (plain.isfinite() and gradient.isfinite().all())
    with guarding(nn.Identity()):
        value, gradient = value_and_gradient(GUARDED[name], INPUTS)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


def test_a_models_own_gradients_are_left_as_they_are() -> None:
    """What a module makes non-finite is no fault of the loss, and stays to be seen."""

    class Root(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            vectors: Tensor = torch.linalg.eigh(torch.eye(3) * inputs[0, 0])[1]
            return vectors.pow(3)

    model = Root()
    with guarding(model):
        _, gradient = value_and_gradient(lambda x: model(x).sum(), INPUTS)
    assert not gradient.isfinite().all()


def test_a_result_of_which_nothing_is_finite_stays_as_it_is() -> None:
    """There is nothing to learn from it, and a zero would hide that."""
    with guarding():
        assert torch.special.i0(torch.tensor([1e6])).isinf().all()

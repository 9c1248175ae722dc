"""Guarded operations: finite at the edge with finite gradients, the same bits away from it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedrounds.doctor.guarded import guarding

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Function = Callable[[Tensor], Tensor]

# Each with the inputs between which it is well defined and away from the edge.
FUNCTIONS: dict[str, tuple[Function, float, float]] = {
    "log": (torch.log, 0.01, 1e4),
    "Tensor.log2": (Tensor.log2, 0.01, 1e4),
    "log10": (torch.log10, 0.01, 1e4),
    "log1p": (torch.special.log1p, -0.9, 1e4),
    "sqrt": (torch.sqrt, 0.01, 1e4),
    "rsqrt": (torch.rsqrt, 0.01, 1e4),
    "1 / x": (lambda x: 1 / x, 0.01, 1e4),
    "1 / -x": (lambda x: 1 / -x, 0.01, 1e4),
    "x / x": (lambda x: x / x, 0.01, 1e4),
    "div": (lambda x: torch.div(3 * x, other=x - 5), -1e4, 4.0),
    "true_divide": (lambda x: torch.true_divide(torch.ones_like(x), x), 0.01, 1e4),
    "div_": (lambda x: x.clone().div_(x), 0.01, 1e4),
    "/=": (lambda x: x.exp().clone().__itruediv__(x), 0.01, 2.0),
    "reciprocal": (torch.reciprocal, 0.01, 1e4),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x, value=0.5), 0.01, 1e4),
    "x ** -1": (lambda x: x**-1, 0.01, 1e4),
    "x ** -2": (lambda x: x**-2.0, 0.1, 100.0),
    "x ** 0.5": (lambda x: x**0.5, 0.01, 1e4),
    "x ** 1.5": (lambda x: torch.pow(x, exponent=1.5), 0.01, 100.0),
    "x ** -0.5": (lambda x: x.pow(-0.5), 0.01, 1e4),
    "pow_": (lambda x: x.clone().pow_(-0.5), 0.01, 1e4),
    "x ** 3": (lambda x: x**3, -10.0, 10.0),
    "x ** tensor": (lambda x: x ** torch.tensor([-1.0], dtype=x.dtype), 0.1, 1e4),
    "tensor ** x": (lambda x: torch.full_like(x, 2.0) ** x, -4.0, 4.0),
    "2 ** x": (lambda x: 2**x, -4.0, 9.0),
    "pow(0.5, x)": (lambda x: torch.pow(0.5, x), -9.0, 4.0),
    "exp": (torch.exp, -9.0, 9.0),
    "exp_": (lambda x: x.clone().exp_(), -9.0, 9.0),
    "exp2": (torch.exp2, -4.0, 9.0),
    "expm1": (Tensor.expm1, -9.0, 9.0),
    "acos": (torch.acos, -0.9, 0.9),
    "asin": (torch.asin, -0.9, 0.9),
    "atanh": (torch.atanh, -0.9, 0.9),
    "acosh": (torch.acosh, 1.1, 1e4),
    "logit": (torch.logit, 0.1, 0.9),
    "log_": (lambda x: x.clone().log_(), 0.01, 1e4),
    "norm": (lambda x: x.norm().reshape(1), -9.0, 9.0),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 3).reshape(1), 0.1, 9.0),
    "mean": (lambda x: x.mean(0, keepdim=True), -9.0, 9.0),
    "std": (lambda x: torch.cat([x, -x, x]).std().reshape(1), 1.0, 9.0),
    "var": (lambda x: torch.stack([x, -x, x]).var(0, unbiased=False), 1.0, 9.0),
}


def value_and_gradient(function: Function, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's values, and the gradient of their sum."""
    leaf = inputs.clone().requires_grad_()
    values = function(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_away_from_the_edge_it_is_torch_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Values and gradients, in every dtype, where the function is well defined.

    Alone, few together and many: both bounds, numbers evenly between them, and the more of them the
    closer to either bound.
    """
    function, low, high = FUNCTIONS[name]
    close = torch.logspace(-7, 0, 100, dtype=torch.float64)
    shares = torch.cat([torch.linspace(0, 1, 100, dtype=torch.float64), close, 1 - close])
    many = (low + (high - low) * shares).to(dtype)
    for inputs in [*many[::60, None].unbind(), *many[::15].reshape(-1, 5).unbind(), many]:
        expected = value_and_gradient(function, inputs)
        with guarding():
            actual = value_and_gradient(function, inputs)
        for value, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"x ** 3", "norm", "vector_norm"}))
def test_at_the_edge_values_and_gradients_are_finite(name: str, dtype: torch.dtype) -> None:
    """Zero of either sign, one, minus one, and numbers near them, none of them moved far."""
    function, _, _ = FUNCTIONS[name]
    tiny = torch.finfo(dtype).tiny
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, tiny, -tiny, 5.0], dtype=dtype)
    with guarding():
        values, gradient = value_and_gradient(function, numbers)
    assert values.isfinite().all(), values
    assert gradient.isfinite().all(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["exp", "exp_", "exp2", "expm1", "2 ** x", "pow(0.5, x)"])
def test_exponentials_end_before_the_dtype_does(name: str, dtype: torch.dtype) -> None:
    """Even the dtype's largest number gives a finite result and gradient; so do sums of two."""
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([largest, -largest, 1e4, -1e4], dtype=dtype)
    with guarding():
        values, gradient = value_and_gradient(FUNCTIONS[name][0], numbers)
    assert values.isfinite().all()
    assert (2 * values).isfinite().all()
    assert gradient.isfinite().all()


def test_the_first_numbers_inside_stay_as_they_are() -> None:
    """The edge is eps, by hand: eps itself isn't moved, half of it is, with its sign."""
    eps = torch.finfo(torch.float32).eps
    inputs = torch.tensor([eps, eps / 2, -eps / 2, -eps])
    with guarding():
        assert (1 / inputs).tolist() == [1 / eps, 1 / eps, -1 / eps, -1 / eps]
        assert inputs.log().tolist() == pytest.approx([math.log(eps)] * 4)
        assert inputs.sqrt().tolist() == pytest.approx([math.sqrt(eps)] * 4)


def test_numbers_that_are_no_tensors() -> None:
    """Divided by 0 is divided by eps; any other number divides as ever, however small."""
    ones = torch.ones(2)
    with guarding():
        assert (ones / 0).tolist() == [2.0**23] * 2
        assert (ones / 1e-30).tolist() == (torch.ones(2) / 1e-30).tolist()
        assert (torch.tensor([3, 0]) / torch.tensor([2, 0])).tolist() == [1.5, 0.0]
        assert (0.0 ** torch.tensor([2.0, 0.0, -1.0])).tolist() == [0.0, 1.0, 1.0]
        assert torch.tensor([4, 0]).log()[0] == torch.tensor(4.0).log()


def test_whole_powers_keep_the_sign_and_fractional_powers_have_none() -> None:
    """(-2) ** -1 is -0.5 as ever; (-2) ** 0.5 isn't a number and becomes the edge's root."""
    base = torch.tensor([-2.0, 2.0, 0.0])
    with guarding():
        assert (base**-1)[:2].tolist() == [-0.5, 0.5]
        assert (base**0.5).isfinite().all()
        assert (base**-6).isfinite().all()
        exponents = torch.tensor([2.0, -1.0, 0.5])
        assert (base**exponents)[:2].tolist() == [4.0, 0.5]
        learned = torch.tensor(2.0, requires_grad=True)
        (gradient,) = torch.autograd.grad((base**learned).sum(), learned)
    assert gradient.isfinite()


def test_a_norm_has_a_gradient_at_zero_without_guard() -> None:
    """The promise of torch that spares norms a guard."""
    for order in (0.5, 1, 2, 3, INF):
        zero = torch.zeros(3, requires_grad=True)
        torch.linalg.vector_norm(zero, order).backward()
        assert zero.grad is not None
        assert zero.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda x: x.mean(), (0,), ()),
        (lambda x: x.mean(1), (2, 0), (2,)),
        (lambda x: torch.mean(x, dim=(0, 1), keepdim=True), (0, 3), (1, 1)),
        (lambda x: x.std(), (1,), ()),
        (lambda x: x.std(0), (1, 3), (3,)),
        (lambda x: torch.var(x, 0, unbiased=True, keepdim=True), (1, 3), (1, 3)),
        (lambda x: x.var(), (0,), ()),
        (lambda x: x.var(dim=-1, correction=1), (3, 1), (3,)),
        (lambda x: x[x > 9].mean(), (4,), ()),
    ],
)
def test_the_mean_of_nothing_and_the_deviation_of_one_are_zero(
    function: Function, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Of the shape that torch gives, with a gradient of zeros."""
    inputs = torch.ones(shape, requires_grad=True)
    with guarding():
        value = function(inputs)
    assert value.shape == expected
    assert (value == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    assert (gradient == 0).all()


def test_nan_and_infinity_are_not_hidden() -> None:
    """What is bad already stays bad: the guard is no nan_to_num."""
    bad = torch.tensor([NAN])
    with guarding():
        for name, (function, _, _) in FUNCTIONS.items():
            assert function(bad).isnan().all() or name == "std", name
        assert (torch.tensor([INF]) / 2).isinf().all()
        assert torch.tensor([INF]).log().isinf().all()


def test_outside_of_the_block_nothing_is_guarded() -> None:
    """Also after an error inside of it."""
    with pytest.raises(RuntimeError), guarding():
        raise RuntimeError
    assert torch.zeros(1).log().isinf().all()


def test_a_loss_with_every_fault_trains_on() -> None:
    """Softmax by hand, log of zero, 0/0, a root at zero: guarded, the gradient is finite."""
    torch.manual_seed(0)
    outputs = (1e4 * torch.randn(6, 3)).requires_grad_()

    def loss_of(logits: Tensor) -> Tensor:
        powers = logits.exp()
        entropy = -(powers / powers.sum(1, keepdim=True)).log()[:, 0].mean()
        distance = ((logits - logits) ** 2).sum(1).sqrt().mean()
        share = logits.relu().sub(logits.relu()) / logits.sub(logits)
        return entropy + distance + share.mean() + logits[logits > 1e9].mean()

    assert not loss_of(outputs).isfinite()
    with guarding():
        loss = loss_of(outputs)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient.isfinite().all()


def test_functions_of_torch_are_themselves_inside() -> None:
    """Cross entropy, batch norm and softmax give the same bits: they aren't looked into."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    functions: list[Callable[[], Tensor]] = [
        lambda: F.cross_entropy(logits, labels),
        lambda: F.batch_norm(logits, None, None, training=True),
        lambda: F.normalize(logits),
        lambda: logits.softmax(1),
    ]
    for function in functions:
        expected = function()
        with guarding():
            assert torch.equal(function(), expected)

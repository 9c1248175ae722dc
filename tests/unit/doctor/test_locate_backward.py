"""The same in backward and in the optimizer's step, and for steps that raise an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedrounds.diagnosis.values import Origin, StepPhase
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.locate import locate, locate_error
from tests.small_networks import (
    Apply,
    Forward,
    cross_entropy,
    near,
    network,
    origin_of,
    outputs_of,
    pair,
    parameter_of,
    samples,
    where,
)

BACKWARD_FAULTS: dict[str, tuple[Forward, str]] = {
    "root at zero": (lambda x: near(x).sqrt(), "div"),
    "a difference of nothing": (lambda x: (near(x) + 1 - 1).abs().sqrt(), "div"),
    "power at zero": (lambda x: near(x) ** 0.5, "pow"),
    "arc cosine at one": (lambda x: (1 - near(x)).acos(), "rsqrt"),
    "a gradient that overflows": (lambda x: x * 1e-30 * 1e35, "mul"),
}


@pytest.mark.parametrize("name", BACKWARD_FAULTS)
def test_the_operation_of_the_backward_is_named(name: str) -> None:
    """The loss is finite; the module is that whose forward made the node of the graph."""
    function, operation = BACKWARD_FAULTS[name]
    fault = locate(network(Apply(function)), samples(), lambda m, b: cross_entropy(m, b)[0] * 1e10)
    assert where(fault) == ("backward", "1", operation)
    # The hidden layer is the first whose gradient is made of it.
    assert origin_of(fault).tensor in ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: torch.where(near(x) > 0, near(x).log(), 0.0), "div"),
        (lambda x: torch.where(x > 99, x / (x - x), x), "div"),
        (lambda x: torch.where(x > 0, (x * 1e3).exp(), x), "exp"),
        (lambda x: (1 / near(x)).clamp(max=9), "reciprocal"),
    ],
)
def test_what_where_leaves_out_comes_back_in_the_backward(
    function: Forward, operation: str
) -> None:
    """Zero times an infinite derivative: located in the operation that made it infinite."""
    fault = locate(network(Apply(function)), samples(), cross_entropy)
    assert where(fault)[1:] == ("1", operation)


def test_the_losss_own_backward_has_no_module() -> None:
    """A root of zero in the loss: located in the backward pass, outside of all modules."""

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        return (outputs_of(model, batch) * 0).abs().sum().sqrt()

    origin = origin_of(locate(network(), samples(), compute_loss))
    assert (origin.phase, origin.module, origin.operation) == (StepPhase.BACKWARD, "", "div")
    # Backward comes to the last layer first, and to its bias before its weight.
    assert origin.tensor in ("2.bias", "2.weight")


def test_a_module_within_modules_and_called_twice() -> None:
    """The innermost is named, with the path that named_modules gives."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), Apply(lambda x: near(x).sqrt()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(self.inner(inputs))  # type: ignore[no-any-return]

    fault = locate(network(Twice()), samples(), cross_entropy)
    assert where(fault) == ("backward", "1.inner.1", "div")


def test_backward_of_a_checkpointed_module() -> None:
    """Its forward is run again in backward; phase and module are those of backward."""
    root = Apply(lambda x: near(x).sqrt())
    model = network()

    def compute_loss(module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, nn.Sequential)
        inputs, labels = pair(batch)
        hidden = checkpoint(module[1], module[0](inputs), use_reentrant=False)
        return F.cross_entropy(module[2](hidden), labels)

    model[1] = root
    phase, _, operation = where(locate(model, samples(), compute_loss))
    assert (phase, operation) == ("backward", "div")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_that_overflows(name: str, foreach: bool) -> None:
    """A rate at which the step is no number any more: phase OPTIMIZER, and the parameter."""
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=3e37, foreach=foreach)

    def step() -> None:
        weight = parameter_of(model, "2.weight")
        optimizer.zero_grad()
        weight.grad = torch.full_like(weight, 1e4)
        with torch.no_grad():
            weight.fill_(-3.39e38)
        optimizer.step()

    origin = origin_of(locate(model, samples(), cross_entropy, optimizer_step=step))
    assert (origin.phase, origin.module) == (StepPhase.OPTIMIZER, "")
    assert origin.tensor == "2.weight"
    assert origin.operation


@pytest.mark.parametrize("foreach", [False, True])
def test_a_second_moment_that_overflows_before_the_weights_do(foreach: bool) -> None:
    """1e25 squared is no float32: Adam holds an infinity, and the weight merely stands still."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)

    def step() -> None:
        gradient = parameter_of(model, "2.bias").grad
        assert gradient is not None
        gradient[1] = 1e25
        optimizer.step()

    fault = locate(model, samples(), cross_entropy, optimizer_step=step)
    origin = origin_of(fault)
    assert origin.phase is StepPhase.OPTIMIZER
    assert origin.tensor == "2.bias"
    assert (origin.shape, origin.num_inf, origin.first_index) == ((3,), 1, (1,))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert fault is not None
    assert fault.largest_input == pytest.approx(1e25)


def test_the_step_is_the_step_that_is_taken_without_watch() -> None:
    """The same bits in weights and buffers, and no hook stays behind."""
    models = [network(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout())) for _ in range(2)]
    for number, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        if number == 0:
            assert locate(model, samples(), cross_entropy, optimizer_step=optimizer.step) is None
        else:
            cross_entropy(model, samples())[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for watched, plain in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(watched, plain)
    for module in models[0].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_error_of_a_label_out_of_range() -> None:
    """Cross entropy raises it: phase LOSS, its operation; locate lets it pass."""
    inputs, labels = samples()
    labels[3] = 7
    located = locate_error(network(), (inputs, labels), cross_entropy)
    assert located is not None
    error, origin, _ = located
    assert isinstance(error, IndexError)
    assert (origin.phase, origin.module, origin.operation) == (
        *(StepPhase.LOSS, ""),
        "nll_loss_forward",
    )
    with pytest.raises(IndexError):
        locate(network(), (inputs, labels), cross_entropy)


def test_the_error_of_batchnorm_with_one_sample() -> None:
    """Raised by Python before any operation: the module is known from where it came out."""
    inputs, labels = samples()
    model = network(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6)))
    located = locate_error(model, (inputs[:1], labels[:1]), cross_entropy)
    assert located is not None
    error, origin, _ = located
    assert isinstance(error, ValueError)
    assert origin == Origin(phase=StepPhase.FORWARD, module="1.1")


def test_errors_of_shapes_in_forward_loss_and_backward() -> None:
    """Each phase says its own name."""
    inputs, labels = samples()
    located = locate_error(network(), (inputs[:, :3], labels), cross_entropy)
    assert located is not None
    assert (located[1].phase, located[1].module) == (StepPhase.FORWARD, "0")

    assert not located.mixes_dtypes

    located = locate_error(network(), (inputs.double(), labels), cross_entropy)
    assert located is not None
    assert (located.origin.phase, located.origin.module) == (StepPhase.FORWARD, "0")
    assert located.mixes_dtypes

    located = locate_error(network(), (inputs, labels[:5]), cross_entropy)
    assert located is not None
    assert (located[1].phase, located[1].module) == (StepPhase.LOSS, "")

    def without_gradient(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch)[0].detach()

    located = locate_error(network(), (inputs, labels), without_gradient)
    assert located is not None
    assert (located[1].phase, located[1].operation) == (StepPhase.BACKWARD, "")
    assert locate_error(network(), (inputs, labels), cross_entropy) is None

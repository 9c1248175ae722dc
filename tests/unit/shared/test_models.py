"""The built-in models compute what their descriptions say, and names stay as they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.errors import InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.models import INITIALISATIONS, CharGRU, SimpleCNN, TabularMLP, initialise
from fedserver.models.first_model import initial_state


def test_names_and_shapes_of_the_state_dict_are_pinned() -> None:
    """Clients of different versions exchange these entries."""
    shapes = {name: tuple(tensor.shape) for name, tensor in SimpleCNN().state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 1600),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }
    assert all(tensor.is_contiguous() for tensor in SimpleCNN().state_dict().values())


def test_logits_and_gradients_are_those_of_relu_before_the_pool() -> None:
    """The model pools first because it is cheaper; the textbook order is the oracle."""
    torch.manual_seed(1)
    model = SimpleCNN().double()
    images = torch.randn(5, 1, 28, 28, dtype=torch.float64)

    logits = model(images)
    logits.square().sum().backward()
    gradients = {name: entry.grad for name, entry in model.named_parameters()}
    model.zero_grad()
    x = F.max_pool2d(F.relu(model.conv1(images)), 2)
    x = F.max_pool2d(F.relu(model.conv2(x)), 2)
    expected = model.fc2(F.relu(model.fc1(x.reshape(5, 1600))))
    expected.square().sum().backward()

    assert logits.shape == (5, 10)
    torch.testing.assert_close(logits, expected)
    for name, entry in model.named_parameters():
        torch.testing.assert_close(gradients[name], entry.grad, msg=name)


def test_the_text_model_predicts_each_next_character_from_those_before() -> None:
    """A change of character 5 changes no prediction made before it, and those made from it on."""
    torch.manual_seed(1)
    model = CharGRU(97)
    assert sum(parameter.numel() for parameter in model.parameters()) == 77_825
    text = torch.randint(97, (3, 12))
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 97
    before, after = model(text), model(changed)
    assert before.shape == (3, 97, 12)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.isclose(before[:, :, 5:], after[:, :, 5:]).all(dim=1).any()


def test_the_table_model_doesnt_mind_the_scale_of_its_numbers() -> None:
    """Numbers a thousand times as large and shifted are, once scaled, the same numbers."""
    torch.manual_seed(1)
    model = TabularMLP(4, 3)
    rows = torch.randn(50, 4)
    torch.testing.assert_close(model(rows), model(rows * 1000 + 7), rtol=1e-3, atol=1e-3)


def test_the_table_model_takes_a_batch_of_one_row() -> None:
    """As in evaluation: one row has no spread. Its gradient still reaches every parameter."""
    torch.manual_seed(1)
    model = TabularMLP(4, 3)
    model(torch.randn(50, 4) * 3 + 1)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    row = torch.randn(1, 4)
    logits = model(row)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(logits, model.eval()(row))


FAN_IN, FAN_OUT = 400, 600
VARIANCES = {
    # He et al. 2015, equation 10; Glorot, Bengio 2010, equation 12.
    "kaiming_uniform": 2 / FAN_IN,
    "kaiming_normal": 2 / FAN_IN,
    "xavier_uniform": 2 / (FAN_IN + FAN_OUT),
    "xavier_normal": 2 / (FAN_IN + FAN_OUT),
    # An orthonormal set of 400 vectors of length 600: each entry's square is 1 / 600 on average.
    "orthogonal": 1 / FAN_OUT,
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_weights_are_drawn_with_the_variance_of_the_paper(name: str) -> None:
    """240,000 draws: the variance is within 2 %, the mean within 5 of its standard errors of 0."""
    torch.manual_seed(1)
    layer = nn.Linear(FAN_IN, FAN_OUT)
    bias = layer.bias.clone()
    initialise(layer, name)
    weight = layer.weight.detach().double()
    assert float(weight.var()) == pytest.approx(VARIANCES[name], rel=0.02)
    assert abs(float(weight.mean())) < 5 * math.sqrt(VARIANCES[name] / weight.numel())
    if name.endswith("uniform"):
        # Uniform over +-a has the variance a^2 / 3; a normal draw would go beyond a.
        assert float(weight.abs().max()) <= math.sqrt(3 * VARIANCES[name]) * 1.0001
    if name == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(FAN_IN).double(), atol=1e-5, rtol=0)
    assert torch.equal(layer.bias, bias)


def test_the_first_global_model_depends_on_seed_and_initialisation_alone() -> None:
    """And the global generator stays where it was."""
    task = find_task("mnist-sample")
    before = torch.get_rng_state()

    def weight(seed: int, init: str) -> Tensor:
        return initial_state(task, seed=seed, init=init)["conv2.weight"]

    assert torch.equal(weight(1, "kaiming_normal"), weight(1, "kaiming_normal"))
    assert not torch.equal(weight(1, "kaiming_normal"), weight(2, "kaiming_normal"))
    assert not torch.equal(weight(1, "kaiming_normal"), weight(1, "default"))
    assert torch.equal(weight(1, "default"), initial_state(task, seed=1)["conv2.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_initialisation_says_what_there_is() -> None:
    with pytest.raises(InvalidInput, match=r"there are: default, kaiming_uniform, .*orthogonal"):
        initialise(nn.Linear(2, 2), "zeros")

"""The built-in model computes what its description says, and its names stay as they are."""

import torch
import torch.nn.functional as F

from shared.models import SimpleCNN


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

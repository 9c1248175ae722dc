"""The built-in models, and how weights are drawn. A task of your own brings its own model."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.errors import InvalidInput


class SimpleCNN(nn.Module):
    """Two convolutions and two linear layers for 28 x 28 grey images of ten classes.

    225,034 parameters, float32, initialised by torch's defaults from the global generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.fc1 = nn.Linear(64 * 5 * 5, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 10] of normalised images [n, 1, 28, 28], both float32."""
        # Channels-last activations make a training step on a CPU a third cheaper; the weights
        # keep their layout, so that their bytes on the wire are those of any other model.
        x = self.conv1(images).contiguous(memory_format=torch.channels_last)
        # 28 -> 26 -> 13 -> 11 -> 5. ReLU after the pool: it is monotone, so the values are
        # those of ReLU before the pool, for a quarter of the work.
        x = F.relu(F.max_pool2d(x, 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class CharGRU(nn.Module):
    """Predicts each next character of a text: an embedding, one GRU, one linear layer.

    float32, initialised by torch's defaults from the global generator; with 97 classes
    77,825 parameters.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 32)
        self.gru = nn.GRU(32, 128, batch_first=True)
        self.head = nn.Linear(128, num_classes)

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits [n, num_classes, length] of characters int64 [n, length]."""
        states, _ = self.gru(self.embedding(characters))
        logits: Tensor = self.head(states)
        return logits.transpose(1, 2)


class TabularMLP(nn.Module):
    """Classifies rows of numbers: scaled by running statistics, then two hidden layers of 64.

    The numbers aren't normalised: no side knows the scale of all clients' numbers. BatchNorm learns
    it, and its statistics are averaged like the weights.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(num_features)
        self.fc1 = nn.Linear(num_features, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [n, num_classes] of rows [n, num_features], both float32."""
        x = self.scale(rows) if len(rows) > 1 or not self.training else self._scale_one(rows)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logits

    def _scale_one(self, row: Tensor) -> Tensor:
        # One row has no variance; the last batch of an epoch may well be one row.
        scale = self.scale
        return F.batch_norm(
            row, scale.running_mean, scale.running_var, scale.weight, scale.bias, eps=scale.eps
        )


INITIALISATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
        "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
        "orthogonal": nn.init.orthogonal_,
    }
)


def initialise(model: nn.Module, name: str) -> None:
    """Draw the model's weights anew from the global generator; "default" leaves them.

    Weights are the parameters of two or more dimensions, without their fan there is none to draw
    by; biases and the like stay as the model made them.

    Raises:
        InvalidInput: no initialisation of this name.
    """
    if name == "default":
        return
    if name not in INITIALISATIONS:
        raise InvalidInput(
            f"there is no initialisation {name!r}; there are: default, {', '.join(INITIALISATIONS)}"
        )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            INITIALISATIONS[name](parameter)

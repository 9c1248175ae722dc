"""The models under examination, small enough for a step in a millisecond."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.doctor_cases.data import NUM_FEATURES, NUM_KINDS, VOCABULARY


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers for 14 x 14 images of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 10] of images [n, 1, 14, 14]; computed in the weights' dtype."""
        x = images.to(self.fc2.weight.dtype)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class NormMLP(nn.Module):
    """Two hidden layers, each with BatchNorm."""

    def __init__(self, num_inputs: int = NUM_FEATURES, num_classes: int = 5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_inputs, 32)
        self.norm1 = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 32)
        self.norm2 = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [n, num_classes] of rows [n, ...]."""
        x = F.relu(self.norm1(self.fc1(rows.flatten(1))))
        logits: Tensor = self.out(F.relu(self.norm2(self.fc2(x))))
        return logits


class PlainMLP(nn.Module):
    """Two hidden layers named as in a list of layers, computed in the weights' dtype."""

    def __init__(
        self, num_inputs: int = NUM_FEATURES, num_outputs: int = 5, width: int = 32
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_outputs),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return outputs [n, num_outputs] of rows [n, num_inputs]."""
        dtype = next(self.parameters()).dtype
        outputs: Tensor = self.layers(rows.to(dtype))
        return outputs


class Wrapped(nn.Module):
    """A PlainMLP with a module of its own between the first layer and the rest."""

    def __init__(self, middle: nn.Module, *, num_outputs: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 32)
        self.middle = middle
        self.second = nn.Linear(32, 32)
        self.out = nn.Linear(32, num_outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """Return outputs [n, num_outputs] of rows [n, 12]."""
        x = self.middle(self.first(rows.to(self.out.weight.dtype)))
        outputs: Tensor = self.out(F.relu(self.second(F.relu(x))))
        return outputs


class SentenceGRU(nn.Module):
    """Classifies sentences: an embedding, a GRU, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.gru = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, NUM_KINDS)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits [n, 4] of words int64 [n, length]."""
        states, _ = self.gru(self.embedding(words))
        logits: Tensor = self.head(states[:, -1])
        return logits


class SeriesRNN(nn.Module):
    """A recurrent net of ReLUs begun at the identity (Le, Jaitly and Hinton 2015)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, width, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin at the identity."""
        self.rnn.reset_parameters()
        self.head.reset_parameters()
        nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))
        nn.init.zeros_(self.rnn.get_parameter("bias_hh_l0"))

    def forward(self, series: Tensor) -> Tensor:
        """Return logits [n, 3] of series [n, length, 3]."""
        states, _ = self.rnn(series)
        logits: Tensor = self.head(states[:, -1])
        return logits


class Attention(nn.Module):
    """Softmax attention over all positions, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.weigh: Callable[[Tensor], Tensor] = _softmax

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, length, width] of the same."""
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        mixed: Tensor = self.weigh(scores) @ self.value(x)
        return mixed


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


class Block(nn.Module):
    """Attention and two linear layers, each after a LayerNorm and beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, length, width] of the same."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


class Tagger(nn.Module):
    """A small transformer that gives each word a tag."""

    def __init__(self, length: int = 8, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(length, width))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, NUM_KINDS)

    def reset_parameters(self) -> None:
        """Draw the places anew."""
        nn.init.normal_(self.places)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits [n, 4, length] of words int64 [n, length]."""
        x = self.words(words) + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits.transpose(1, 2)


class Autoencoder(nn.Module):
    """Squeezes an image of 14 x 14 into 16 numbers and back; gives the pixels' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 196))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 196] of images [n, 196]."""
        logits: Tensor = self.decoder(self.encoder(images))
        return logits


class Twins(nn.Module):
    """Embeds both rows of a pair with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(NUM_FEATURES, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings [n, 8] of both."""
        return self.encoder(left), self.encoder(right)

"""The built-in model. A task of your own brings its own (see shared.tasks)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

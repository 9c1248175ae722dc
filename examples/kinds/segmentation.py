"""Segmentation with an ignored label: pixels of label 255 are no targets."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from examples.kinds import seed_of
from fedrounds import Task


def draw(seed: int) -> TensorDataset:
    """Return images float32 [160, 1, 8, 8] and masks int64 [160, 8, 8]: 1 in a bright square."""
    rng = torch.Generator().manual_seed(seed)
    images, masks = 0.3 * torch.randn(160, 1, 8, 8, generator=rng), torch.zeros(160, 8, 8).long()
    for number, (row, column) in enumerate(torch.randint(5, (160, 2), generator=rng).tolist()):
        images[number, :, row : row + 3, column : column + 3] += 2
        masks[number, row : row + 3, column : column + 3] = 1
    masks[torch.rand(160, 8, 8, generator=rng) < 0.1] = 255
    return TensorDataset(images, masks)


task = Task(
    name="segmentation",
    build_model=lambda: nn.Conv2d(1, 2, 3, padding=1),
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    loss=nn.CrossEntropyLoss(ignore_index=255),
)

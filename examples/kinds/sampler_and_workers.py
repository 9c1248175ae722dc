"""Rare examples drawn as often as usual ones, and read by a process beside the training."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, WeightedRandomSampler

from examples.kinds import seed_of
from fedrounds import Task


class Unbalanced(Dataset[tuple[Tensor, int]]):
    """Points around one of two centres, of which the second is rare in training."""

    def __init__(self, seed: int, share: float) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.labels = (torch.rand(160, generator=rng) < share).long()
        self.points = torch.randn(160, 2, generator=rng) + 3 * self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], int(self.labels[index])


def sample(examples: Dataset[tuple[Tensor, int]], rng: torch.Generator) -> WeightedRandomSampler:
    """Return a sampler that draws both labels equally often."""
    labels = torch.tensor([examples[index][1] for index in range(len(examples))])  # type: ignore[arg-type]
    return WeightedRandomSampler(
        (1 / labels.bincount()[labels]).tolist(), len(labels), generator=rng
    )


task = Task(
    name="sampler-and-workers",
    build_model=lambda: nn.Linear(2, 2),
    load_train=lambda request: Unbalanced(seed_of(request), share=0.1),
    load_test=lambda _: Unbalanced(0, share=0.5),
    loss=nn.functional.cross_entropy,
    sampler=sample,
    num_workers=1,
)

"""Sequences of different lengths: collate pads them, and the inputs are (sequences, lengths)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from examples.kinds import seed_of
from fedrounds import Task

Example = tuple[Tensor, int]


class Walks(Dataset[Example]):
    """Walks of 2 to 9 steps; the label says whether a walk ends above its start."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 10, (160,), generator=rng).tolist()
        self.walks = [torch.randn(length, generator=rng) for length in lengths]

    def __len__(self) -> int:
        return len(self.walks)

    def __getitem__(self, index: int) -> Example:
        return self.walks[index], int(self.walks[index].sum() > 0)


def collate(examples: list[Example]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((steps float32 [n, longest], lengths int64 [n]), labels int64 [n])."""
    walks, labels = zip(*examples, strict=True)
    lengths = torch.tensor([len(walk) for walk in walks])
    return (pad_sequence(list(walks), batch_first=True), lengths), torch.tensor(labels)


class Recurrent(nn.Module):
    """Takes (steps [n, longest], lengths [n]) to logits [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(1, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Read each walk and answer after its last step."""
        steps, lengths = inputs
        hidden, _ = self.rnn(steps[:, :, None])
        logits: Tensor = self.head(hidden[torch.arange(len(lengths)), lengths - 1])
        return logits


task = Task(
    name="variable-length",
    build_model=Recurrent,
    load_train=lambda request: Walks(seed_of(request)),
    load_test=lambda _: Walks(0),
    loss=nn.functional.cross_entropy,
    collate=collate,
)

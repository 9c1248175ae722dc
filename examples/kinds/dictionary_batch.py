"""Batches that are dictionaries, and a model that returns its loss, as Hugging Face's do."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from examples.kinds import seed_of
from fedrounds import Task


class Words(Dataset[dict[str, Any]]):
    """Rows of eight word numbers below 20; the label says whether the words are mostly high."""

    def __init__(self, seed: int) -> None:
        self.words = torch.randint(20, (160, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self.words[index]
        return {"input_ids": words, "labels": int(words.sum() >= 76), "text": f"row {index}"}


class Classifier(nn.EmbeddingBag):
    """Takes a batch by its names to {"loss", "logits"}."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the mean cross-entropy and logits [n, 2]."""
        logits = super().forward(input_ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


task = Task(
    name="dictionary-batch",
    build_model=lambda: Classifier(20, 2, mode="sum"),
    load_train=lambda request: Words(seed_of(request)),
    load_test=lambda _: Words(0),
    training_step=lambda model, batch: model(batch["input_ids"], batch["labels"]),
    num_classes=2,
)

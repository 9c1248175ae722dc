"""A LightningModule with the doctor in it; needs the extra `adapters`.

    python examples/lightning_module.py

`Doctored` is all that it takes: put it before the module's own class. Here one of 64 examples holds
a NaN; the doctor names it, leaves it out, and training goes on.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedrounds.diagnosis.text import verdict
from fedrounds.doctor import Doctor


class Doctored(LightningModule):
    """A module whose every step the doctor takes; for one optimizer, and not for 16-mixed."""

    doctor: Doctor | None = None

    def on_fit_start(self) -> None:
        """Refuse what can't be; the optimizer's steps become the doctor's."""
        super().on_fit_start()
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "the doctor can't use Lightning's own scaler; set precision bf16-mixed"
            )
        self.automatic_optimization = False

    def training_step(self, batch: object, batch_idx: int) -> dict[str, float]:
        """Return the loss of a batch, after the doctor's step on it."""
        del batch_idx
        optimizer = self.optimizers()
        if self.doctor is None:
            self.doctor = Doctor(
                self,
                optimizer.optimizer,
                lambda module, batch: super(Doctored, module).training_step(batch, 0),  # noqa: UP008
            )
        loss = self.doctor.step(batch).loss
        # Lightning counts the steps of its own optimizer: without gradients it does nothing else.
        optimizer.zero_grad()
        optimizer.step()
        return {"loss_value": loss}


class Classifier(LightningModule):
    """A linear model of 8 inputs and 2 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Return the loss of a batch."""
        del batch_idx
        inputs, labels = batch
        return functional.cross_entropy(self.head(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


class DoctoredClassifier(Doctored, Classifier):
    """The same with the doctor."""


def train(module_class: type[Classifier], *, is_faulty: bool) -> Classifier:
    """Return a module after two epochs on 64 examples; a faulty one is number 20, with a NaN."""
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    labels = (inputs[:, 0] > 0).long()
    if is_faulty:
        inputs[20, 3] = torch.nan
    torch.manual_seed(0)
    module = module_class()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(2)
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), 8, shuffle=True, generator=order))
    return module


if __name__ == "__main__":
    for diagnosis in train(DoctoredClassifier, is_faulty=True).doctor.diagnoses:
        print(verdict(diagnosis))

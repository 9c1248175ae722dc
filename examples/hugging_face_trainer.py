"""Hugging Face's Trainer with the doctor in it; needs the extra `adapters`.

    python examples/hugging_face_trainer.py

`DoctoredTrainer` is all that it takes: use it in place of `transformers.Trainer`. Here one of 64
examples holds a NaN; the doctor names it, leaves it out, and training goes on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from fedrounds.diagnosis.text import verdict
from fedrounds.doctor import Doctor


class DoctoredTrainer(Trainer):
    """A Trainer whose every step the doctor takes; not for fp16, whose scaler is the Trainer's."""

    doctor: Doctor | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: object = None
    ) -> Tensor:
        """Return the loss of a batch, after the doctor's step on it."""
        del num_items_in_batch
        if self.args.fp16:
            raise ValueError(
                "the doctor can't use the Trainer's own scaler; set bf16 in place of fp16"
            )
        if self.doctor is None:
            clip_norm = self.args.max_grad_norm or None
            self.doctor = Doctor(
                model, self.optimizer.optimizer, self._loss_of, clip_norm=clip_norm
            )
        model.train()
        updates = self.accelerator.sync_gradients
        taken = self.doctor.step(self._prepare_inputs(inputs), updates=updates)
        if updates:
            # The Trainer's own optimizer step finds no gradients, and does nothing.
            model.zero_grad()
        return torch.tensor(taken.loss)

    def _loss_of(self, model: nn.Module, inputs: object) -> tuple[Tensor, object]:
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        return loss / self.current_gradient_accumulation_steps, outputs


class Classifier(nn.Module):
    """A linear model of 8 inputs and 2 classes, in the form of a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.head(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def draw_examples(*, is_faulty: bool) -> list[dict[str, Tensor]]:
    """Return 64 examples; a faulty one is number 20, with a NaN."""
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    labels = (inputs[:, 0] > 0).long()
    if is_faulty:
        inputs[20, 3] = torch.nan
    return [{"inputs": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]


def train(
    trainer_class: type[Trainer], folder: str, *, is_faulty: bool, accumulation: int = 1
) -> Trainer:
    """Return a trainer after two epochs; `folder` is its output folder."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=Classifier(), args=arguments, train_dataset=draw_examples(is_faulty=is_faulty)
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for diagnosis in train(DoctoredTrainer, "trainer", is_faulty=True).doctor.diagnoses:
        print(verdict(diagnosis))

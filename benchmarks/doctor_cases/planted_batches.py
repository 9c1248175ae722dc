"""Faults in labels, and batches that can't be learned from."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import (
    Case,
    Expected,
    one_value,
    plant_samples,
)
from benchmarks.doctor_cases.nets import SmallCNN, Wrapped
from benchmarks.doctor_cases.training import Batch, Fault, Task
from fedrounds.diagnosis.values import Cause, StepPhase

_LABEL = frozenset({Cause.BAD_LABEL})
_DEGENERATE = frozenset({Cause.DEGENERATE_BATCH})
_FORWARD = frozenset({StepPhase.FORWARD})
_LOSS = frozenset({StepPhase.LOSS})
# Found by looking at the labels, or because the loss raised an error.
_BY_LABEL = frozenset({StepPhase.INPUT, StepPhase.LOSS})


def bad_labels() -> list[Case]:
    """Return the cases of labels that there aren't."""
    unknown_number = replace(tasks.MLP, num_classes=None)
    rows: list[tuple[str, Task, str, int, dict[int, int]]] = [
        ("cnn label 10 of 10", tasks.CNN, "labels", 10, {24: 1}),
        ("small cnn label -1 at the first step", tasks.SMALL_CNN, "labels", -1, {1: 1}),
        ("small cnn label 255, three", tasks.SMALL_CNN, "labels", 255, {47: 3}),
        ("norm mlp label -1, late", tasks.NORM_MLP, "labels", -1, {49: 1}),
        ("table label 5 of 5", tasks.TABLE, "labels", 5, {11: 2}),
        ("gru label 4 of 4", tasks.GRU, "labels", 4, {20: 1}),
        ("rnn label -1 in three batches", tasks.RNN, "labels", -1, {6: 1, 19: 1, 38: 1}),
        ("mlp label 12, classes not declared", unknown_number, "labels", 12, {26: 1}),
        ("transformer tag 4 of 4", tasks.TAGGER, "tags", 4, {21: 1}),
    ]
    return [
        plant_samples(
            name,
            task,
            key=key,
            change=one_value(label),
            steps=steps,
            seed=seed,
            causes=_LABEL,
            phases=_BY_LABEL,
        )
        for seed, (name, task, key, label, steps) in enumerate(rows, start=200)
    ]


class Standardise(nn.Module):
    """Subtracts the batch's mean and divides by its standard deviation, and adds nothing to it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width] of the same."""
        if not self.training:
            return x
        scaled: Tensor = (x - x.mean(0)) / x.std(0, correction=0)
        return scaled


class PooledNormCNN(SmallCNN):
    """A small CNN with BatchNorm behind its pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 10] of images [n, 1, 14, 14]."""
        x = nn.functional.max_pool2d(self.conv1(images), 2).relu()
        x = nn.functional.max_pool2d(self.conv2(x), 2).relu()
        logits: Tensor = self.fc2(self.fc1(self.norm(x.flatten(1))).relu())
        return logits


def degenerate_batches() -> list[Case]:
    """Return the cases of batches with nothing, too little or no variety in them."""
    pooled = replace(tasks.SMALL_CNN, build=PooledNormCNN, epochs=3)
    standardised = replace(tasks.MLP, build=lambda: Wrapped(Standardise()), epochs=3)
    either = frozenset({Cause.DEGENERATE_BATCH, Cause.LOSS_FUNCTION})
    return [
        _one_left_over("norm mlp last batch of one", tasks.NORM_MLP, "norm1"),
        _one_left_over("norm cnn last batch of one", pooled, "norm"),
        _one_left_over("standardised mlp last batch of one", standardised, "middle"),
        _odd_batch("cnn empty batch", tasks.CNN, {29}, _emptied, _LOSS),
        _odd_batch("small cnn empty first batch", tasks.SMALL_CNN, {1}, _emptied, _LOSS),
        _odd_batch("transformer two empty batches", tasks.TAGGER, {50, 95}, _emptied, _LOSS),
        _odd_batch("siamese empty batch", tasks.TWINS, {77}, _emptied, _LOSS),
        _odd_batch(
            "standardised mlp all samples the same",
            standardised,
            {33},
            _all_the_same,
            _FORWARD,
            modules=frozenset({"middle"}),
        ),
        _odd_batch(
            "standardised mlp all the same at the first step",
            standardised,
            {1},
            _all_the_same,
            _FORWARD,
            modules=frozenset({"middle"}),
        ),
        # A batch without a single tag; and a mean that divides by the number of tags.
        _odd_batch(
            "transformer no tag in a batch", tasks.TAGGER, {40}, _untagged, _LOSS, causes=either
        ),
    ]


def _one_left_over(name: str, task: Task, module: str) -> Case:
    num_examples = task.order(0).num_steps // 4 * task.batch_size + 1
    shorter = replace(task, num_examples=num_examples)
    order = shorter.order(210)
    assert len(order.at(order.steps_per_epoch)) == 1
    return Case(
        name=name,
        task=shorter,
        seed=210,
        fault=Fault(),
        expected=Expected(
            causes=_DEGENERATE,
            phases=_FORWARD,
            modules=frozenset({module}),
            step=order.steps_per_epoch,
        ),
        twin={"num_examples": num_examples - 1},
    )


def _odd_batch(
    name: str,
    task: Task,
    steps: set[int],
    change: Callable[[Tensor], Tensor],
    phases: frozenset[StepPhase],
    *,
    causes: frozenset[Cause] = _DEGENERATE,
    modules: frozenset[str] = frozenset({""}),
) -> Case:
    def spoil(step: int, batch: Batch) -> Batch | None:
        if step not in steps:
            return None
        if isinstance(batch, dict):
            return {name: change(tensor) for name, tensor in batch.items()}
        return tuple(change(tensor) for tensor in batch)

    return Case(
        name=name,
        task=task,
        seed=220,
        fault=Fault(batch=spoil),
        expected=Expected(causes=causes, phases=phases, modules=modules, step=min(steps)),
    )


def _emptied(tensor: Tensor) -> Tensor:
    return tensor[:0]


def _all_the_same(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor).clone()


def _untagged(tensor: Tensor) -> Tensor:
    # Words stay what they are; a batch's tags are told by the padding among them.
    has_padding = bool((tensor == data.PADDING).any())
    return torch.full_like(tensor, data.PADDING) if has_padding else tensor

"""What the doctor costs where nothing is wrong, beside a bare PyTorch loop.

Armed, unarmed, bare and under `torch.autograd.set_detect_anomaly` train models of their own and
take turns step by step, in another random order each time, so that whatever slows the machine
slows all. Each block of steps gives a ratio (or a difference); the interval is made of these. What
is measured is the processor time of the one thread that trains: neither a training nor the doctor
waits for anything, and other processes' turns don't count.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.nets import Tagger
from benchmarks.doctor_cases.plain import loss_of
from benchmarks.doctor_cases.training import Step, Task, Training, begin
from benchmarks.epoch import median_interval
from fedrounds.doctor import Doctor, DoctorSettings

_WAYS = ("bare", "armed", "unarmed", "anomaly")


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Medians over blocks with 95 % intervals: ratios to bare, and microseconds a step over it."""

    name: str
    bare_us: float
    ratios: dict[str, tuple[float, float, float]]
    over_us: dict[str, tuple[float, float, float]]


class _SeriesLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 96, batch_first=True)
        self.head = nn.Linear(96, 3)

    def forward(self, series: Tensor) -> Tensor:
        states, _ = self.lstm(series)
        logits: Tensor = self.head(states[:, -1])
        return logits


_LSTM = replace(
    tasks.RNN,
    architecture="LSTM",
    load=functools.partial(data.series, 40),
    build=_SeriesLSTM,
    clip_norm=None,
)
_TRANSFORMER = replace(
    tasks.TAGGER, build=functools.partial(Tagger, width=128), batch_size=64, num_classes=None
)


def measure_overhead(*, num_blocks: int = 31, num_steps: int = 12) -> list[Overhead]:
    """Return the overhead for three models with steps of 5 ms and more, and for a tiny MLP."""
    return [
        _measure("SimpleCNN, batches of 32", tasks.CNN, num_blocks, num_steps),
        _measure("transformer, batches of 64 x 8 words", _TRANSFORMER, num_blocks, num_steps),
        _measure("LSTM, batches of 32 x 40 values", _LSTM, num_blocks, num_steps),
        _measure("MLP of 12-32-32-5, batches of 32", tasks.MLP, num_blocks, 10 * num_steps),
    ]


def _measure(name: str, task: Task, num_blocks: int, num_steps: int) -> Overhead:
    endless = replace(task, epochs=10**6)
    loops = {way: _loop(way, begin(endless, seed=1)) for way in _WAYS}
    order = random.Random(1)
    for loop in loops.values():
        for _ in range(num_steps):
            next(loop)
    blocks: list[dict[str, float]] = []
    for _ in range(num_blocks):
        block = dict.fromkeys(_WAYS, 0.0)
        for _ in range(num_steps):
            for way in order.sample(_WAYS, len(_WAYS)):
                began = time.thread_time()
                next(loops[way])
                block[way] += (time.thread_time() - began) / num_steps
        blocks.append(block)
    others = _WAYS[1:]
    return Overhead(
        name=name,
        bare_us=1e6 * statistics.median(block["bare"] for block in blocks),
        ratios={way: _interval([block[way] / block["bare"] for block in blocks]) for way in others},
        over_us={
            way: _interval([1e6 * (block[way] - block["bare"]) for block in blocks])
            for way in others
        },
    )


def _interval(values: list[float]) -> tuple[float, float, float]:
    return (statistics.median(values), *median_interval(sorted(values)))


def _loop(way: str, training: Training) -> Iterator[None]:
    steps = (
        given for epoch in range(1, training.task.epochs + 1) for given in training.epoch(epoch)
    )
    take: Callable[[Step], object]
    if way in ("armed", "unarmed"):
        doctor = Doctor(
            training.model,
            training.optimizer,
            training.task.loss,
            settings=DoctorSettings(is_armed=way == "armed"),
            num_classes=training.task.num_classes,
        )

        def take(given: Step) -> None:
            doctor.step(given.batch, indices=given.indices)
    else:

        def take(given: Step) -> None:
            with torch.autograd.set_detect_anomaly(way == "anomaly"):
                _bare_step(training.model, training, given)

    for given in steps:
        take(given)
        yield


def _bare_step(model: nn.Module, training: Training, given: Step) -> None:
    training.optimizer.zero_grad()
    loss = loss_of(training.task.loss(model, given.batch))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    training.optimizer.step()
    # Everybody looks at the loss.
    loss.item()

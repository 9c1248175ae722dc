"""What train_model costs beside a bare PyTorch loop: one epoch over the bundled digits.

    python -m benchmarks.epoch [--epochs 15] [--examples 10000] [--batch-size 32] [--threads 1]
                               [--write]

Both train a SimpleCNN of their own with SGD and momentum, over the same tensors in batches of one
size. They take turns step by step, so that whatever slows the machine down slows both. Each epoch
gives a ratio; printed is the median with a 95 % interval made of the ratios themselves (order
statistics, no distribution assumed), of the time on the clock and of the processor's, which others
on the machine disturb less. Reach: 1.1.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.federation import machine_line, write_section
from fedrounds.data import load_images, make_loader, to_dataset
from fedrounds.tasks.models import SimpleCNN
from fedrounds.training.loop import Callbacks, StepProgress, train_model

_LR = 0.01
_MOMENTUM = 0.9
_SEED = 1


class Seconds(NamedTuple):
    """How long something took, on the clock and of the processor."""

    clock: float
    processor: float


def main() -> None:
    """Time the epochs and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    whole = to_dataset(load_images("mnist-sample", "train"))
    images, labels = (tensor[: arguments.examples] for tensor in whole.tensors)
    batch_size = arguments.batch_size
    _time_epoch(images[: 20 * batch_size], labels[: 20 * batch_size], batch_size)
    timed = [_time_epoch(images, labels, batch_size) for _ in range(arguments.epochs)]
    lines = [
        f"{machine_line()}: {arguments.epochs} times one epoch, {len(images)} images, "
        f"{math.ceil(len(images) / batch_size)} steps of {batch_size}, "
        f"{arguments.threads} thread(s)",
        "",
    ]
    for clock, name in enumerate(Seconds._fields):
        own = [seconds[clock] for seconds, _ in timed]
        bare = [seconds[clock] for _, seconds in timed]
        ratios = sorted(own_s / bare_s for own_s, bare_s in zip(own, bare, strict=True))
        low, high = median_interval(ratios)
        lines.append(
            f"- {name}: train_model {statistics.median(own):.3f} s, bare loop "
            f"{statistics.median(bare):.3f} s, ratio {statistics.median(ratios):.3f} "
            f"(95 % interval {low:.3f} to {high:.3f})"
        )
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        write_section("epoch", text)


def median_interval(values: list[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval that holds the median at least so often; `values` ascend.

    The number of values below the true median is binomial(n, 1/2): the k lowest and the k
    highest are left out, for the largest k with 2 P(below <= k - 1) <= 1 - confidence.
    """
    num = len(values)
    k, outside = 0, 0.0
    while k < num // 2:
        outside += math.comb(num, k) / 2**num
        if 2 * outside > 1 - confidence:
            break
        k += 1
    k = max(k, 1)
    return values[k - 1], values[num - k]


def _time_epoch(images: Tensor, labels: Tensor, batch_size: int) -> tuple[Seconds, Seconds]:
    """Return the seconds of an epoch under train_model, and in the bare loop."""
    torch.manual_seed(_SEED)
    model = SimpleCNN()
    loader = make_loader(TensorDataset(images, labels), batch_size=batch_size, seed=_SEED)
    bare = _bare_steps(images, labels, batch_size)
    bare_clock = bare_processor = 0.0

    def take_turn(_: StepProgress) -> None:
        nonlocal bare_clock, bare_processor
        clock, processor = time.perf_counter(), time.process_time()
        next(bare)
        bare_clock += time.perf_counter() - clock
        bare_processor += time.process_time() - processor

    clock, processor = time.perf_counter(), time.process_time()
    train_model(
        model, loader, epochs=1, lr=_LR, momentum=_MOMENTUM, callbacks=Callbacks(on_step=take_turn)
    )
    return (
        Seconds(
            time.perf_counter() - clock - bare_clock,
            time.process_time() - processor - bare_processor,
        ),
        Seconds(bare_clock, bare_processor),
    )


def _bare_steps(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[None]:
    """Train in the loop that everybody writes first, pausing after each step."""
    torch.manual_seed(_SEED)
    model = SimpleCNN()
    descent = torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM)
    generator = torch.Generator().manual_seed(_SEED)
    for indices in torch.split(torch.randperm(len(images), generator=generator), batch_size):
        descent.zero_grad()
        loss = F.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        descent.step()
        yield


if __name__ == "__main__":
    main()

"""The data that is learned: digits, and sets drawn from frozen seeds that are easy to learn.

Easy on purpose: a training that ends at the same score whatever its path lets half a point be
judged.
"""

import functools

import torch
from torch import Tensor

from benchmarks.doctor_cases.training import Data
from fedrounds.data import load_images, to_dataset

NUM_TEST = 1000
VOCABULARY = 40
NUM_KINDS = 4
NUM_FEATURES = 12
PADDING = -100


@functools.cache
def digits(classes: tuple[int, ...], *, is_small: bool = False) -> tuple[Data, Data]:
    """Return images float32 [n, 1, 28, 28] (small: 14 x 14) of some digits, labels as they are.

    The test data is the sample's own and the end of its training data, 1000 images at most.
    """
    pairs = []
    for split in ("train", "test"):
        data = load_images("mnist-sample", "train" if split == "train" else "test")
        images, labels = to_dataset(data).tensors
        chosen = torch.isin(labels, torch.tensor(classes))
        images, labels = images[chosen], labels[chosen]
        if is_small:
            images = torch.nn.functional.avg_pool2d(images, 2)
        pairs.append((images, labels))
    (images, labels), (test_images, test_labels) = pairs
    num_more = max(0, NUM_TEST - len(test_labels))
    num_train = len(labels) - num_more
    return (
        {"images": images[:num_train], "labels": labels[:num_train]},
        {
            "images": torch.cat((test_images[:NUM_TEST], images[num_train:])),
            "labels": torch.cat((test_labels[:NUM_TEST], labels[num_train:])),
        },
    )


def images_alone(classes: tuple[int, ...]) -> tuple[Data, Data]:
    """Return small images scaled to 0..1 without their labels, float32 [n, 196]."""
    train, test = (
        {"images": (split["images"].flatten(1) * 0.3081 + 0.1307).clamp(0, 1)}
        for split in digits(classes, is_small=True)
    )
    return train, test


def _split(data: Data, num_train: int) -> tuple[Data, Data]:
    return (
        {name: tensor[:num_train] for name, tensor in data.items()},
        {name: tensor[num_train:] for name, tensor in data.items()},
    )


@functools.cache
def blobs(num_classes: int = 5, scale: float = 1.0) -> tuple[Data, Data]:
    """Return rows float32 [n, 12] around a centre for each class, and labels."""
    drawn = torch.Generator().manual_seed(11)
    centres = 2.5 * torch.randn(num_classes, NUM_FEATURES, generator=drawn)
    labels = torch.randint(num_classes, (3000,), generator=drawn)
    rows = centres[labels] + torch.randn(3000, NUM_FEATURES, generator=drawn)
    return _split({"rows": scale * rows, "labels": labels}, 2000)


@functools.cache
def sentences() -> tuple[Data, Data]:
    """Return words int64 [n, 10]: the label says which quarter of the vocabulary is common."""
    drawn = torch.Generator().manual_seed(12)
    labels = torch.randint(NUM_KINDS, (3000,), generator=drawn)
    per_kind = VOCABULARY // NUM_KINDS
    common = labels[:, None] * per_kind + torch.randint(per_kind, (3000, 10), generator=drawn)
    # The last two words stand in no sentence, so that their embeddings are never used.
    anything = torch.randint(VOCABULARY - 2, (3000, 10), generator=drawn)
    is_common = torch.rand(3000, 10, generator=drawn) < 0.85
    words = torch.where(is_common, common, anything).clamp(max=VOCABULARY - 3)
    return _split({"words": words, "labels": labels}, 2000)


@functools.cache
def tagged_sentences() -> tuple[Data, Data]:
    """Return words int64 [n, 8] and a tag int64 [n, 8] each, PADDING behind the last word.

    A word's tag is the kind of the word before it: it can't be told from the word alone.
    """
    drawn = torch.Generator().manual_seed(13)
    words = torch.randint(VOCABULARY, (3000, 8), generator=drawn)
    before = torch.roll(words, 1, dims=1)
    before[:, 0] = 0
    tags = before % NUM_KINDS
    lengths = torch.randint(3, 9, (3000, 1), generator=drawn)
    tags = torch.where(torch.arange(8) < lengths, tags, PADDING)
    return _split({"words": words, "tags": tags}, 2000)


@functools.cache
def series(length: int = 12) -> tuple[Data, Data]:
    """Return series float32 [n, length, 3]; the label is which of 3 channels rises most."""
    drawn = torch.Generator().manual_seed(14)
    labels = torch.randint(3, (3000,), generator=drawn)
    noise = 0.5 * torch.randn(3000, length, 3, generator=drawn)
    slope = torch.zeros(3000, 3).scatter_(1, labels[:, None], 1.0)
    ramp = torch.linspace(-1, 2, length)
    return _split({"series": noise + ramp[None, :, None] * slope[:, None], "labels": labels}, 2000)


@functools.cache
def curve(scale: float = 1.0) -> tuple[Data, Data]:
    """Return rows float32 [n, 12] and a target float32 [n, 1] that is smooth in them."""
    drawn = torch.Generator().manual_seed(15)
    rows = torch.randn(3000, NUM_FEATURES, generator=drawn)
    slopes = torch.randn(NUM_FEATURES, generator=drawn) / NUM_FEATURES**0.5
    targets = rows @ slopes + 0.3 * torch.sin(rows[:, 0])
    return _split({"rows": rows, "targets": scale * targets[:, None]}, 2000)


@functools.cache
def pairs() -> tuple[Data, Data]:
    """Return pairs of rows float32 [n, 12], and 1 where both come from the same centre."""
    drawn = torch.Generator().manual_seed(16)
    centres = 3.0 * torch.randn(6, NUM_FEATURES, generator=drawn)
    left = torch.randint(6, (3000,), generator=drawn)
    other = (left + torch.randint(1, 6, (3000,), generator=drawn)) % 6
    is_same = torch.rand(3000, generator=drawn) < 0.5
    right = torch.where(is_same, left, other)

    def rows(kinds: Tensor) -> Tensor:
        return centres[kinds] + 0.7 * torch.randn(3000, NUM_FEATURES, generator=drawn)

    return _split({"left": rows(left), "right": rows(right), "same": is_same.long()}, 2000)

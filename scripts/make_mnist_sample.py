"""Make shared/fedrounds/data/mnist_sample.npz from the full MNIST.

    python -m scripts.make_mnist_sample DATA_ROOT

DATA_ROOT holds MNIST in torchvision's layout (DATA_ROOT/MNIST/raw/train-images-idx3-ubyte ...).
The same files give the same images: 1,000 of each digit for training, 200 for testing, drawn by
a fixed seed and kept in their original order.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedrounds.data.datasets import SAMPLE_PATH, Split, load_images

SEED = 20261122
NUM_PER_CLASS: dict[Split, int] = {"train": 1000, "test": 200}


def main() -> None:
    """Draw both splits and write the compressed file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--output", type=Path, default=SAMPLE_PATH)
    arguments = parser.parse_args()

    arrays: dict[str, NDArray[np.uint8]] = {}
    for split, num_per_class in NUM_PER_CLASS.items():
        data = load_images("mnist", split, data_root=arguments.data_root)
        chosen = sample_by_class(data.labels, num_per_class, np.random.default_rng(SEED))
        arrays[f"{split}_images"] = data.images[chosen]
        arrays[f"{split}_labels"] = data.labels[chosen].astype(np.uint8)
    np.savez_compressed(arguments.output, **arrays)  # type: ignore[arg-type]  # numpy's stub
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


def sample_by_class(
    labels: NDArray[np.int64], num_per_class: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the sorted indices of `num_per_class` random examples of each class."""
    drawn = [
        rng.choice(np.flatnonzero(labels == label), num_per_class, replace=False)
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(drawn))


if __name__ == "__main__":
    main()

"""Data sets, and the ways to cut a data set into the private shares of many clients."""

from pathlib import Path

from fedrounds.data.augmentation import AugmentedBatches
from fedrounds.data.datasets import ImageClassificationData, load_images, to_dataset
from fedrounds.data.loaders import NumberedLoader, make_loader, set_aside
from fedrounds.data.partitioners import PARTITIONERS, partition_indices, validate_scheme
from fedrounds.seeds import derive_seed

__all__ = [
    "PARTITIONERS",
    "AugmentedBatches",
    "ImageClassificationData",
    "NumberedLoader",
    "load_data",
    "load_images",
    "make_loader",
    "partition_indices",
    "set_aside",
    "to_dataset",
    "validate_scheme",
]


def load_data(
    iid: bool = True,
    num_clients: int = 10,
    batch_size: int = 64,
    *,
    seed: int = 0,
    name: str = "mnist-sample",
    data_root: Path | None = None,
) -> tuple[list[NumberedLoader], NumberedLoader]:
    """Return the clients' training loaders and one test loader, for experiments in one process.

    `iid=True` deals the examples out at random; `iid=False` deals shards sorted by label, so
    that most clients see two classes of ten (see `partitioners.split_shards`). Batches are
    (images float32 [batch, 1, 28, 28] normalised, labels int64 [batch]). Each client shuffles
    from a stream of its own, seeded from `seed`; the test set isn't shuffled.

    Raises:
        InvalidInput: unknown name, or a number of clients or a batch size that can't be.
        DataUnavailable: the data set is neither there nor to be had.
    """
    train = load_images(name, "train", data_root=data_root, may_download=True)
    test = load_images(name, "test", data_root=data_root, may_download=True)
    shares = partition_indices(
        train.labels,
        scheme="iid" if iid else "shards",
        num_partitions=num_clients,
        seed=seed,
    )
    client_loaders = [
        make_loader(
            to_dataset(train, share),
            batch_size=batch_size,
            seed=derive_seed(seed, "shuffle", client_id=index),
        )
        for index, share in enumerate(shares)
    ]
    return client_loaders, make_loader(to_dataset(test), batch_size=batch_size, shuffle=False)

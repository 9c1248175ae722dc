"""Data sets and tasks: what a client gets, and the error when it can't get it."""

import gzip
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fedrounds.data import datasets, load_data, load_images, to_dataset
from fedrounds.errors import DataUnavailable, InvalidInput, OwnCodeFailed
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.models import SimpleCNN
from fedrounds.tasks.task import (
    DataRequest,
    Examples,
    Partition,
    Task,
    build_model,
    count_examples,
    validate_example,
)

OWN_TASK = Task(
    name="own",
    build_model=lambda: nn.Linear(3, 2),
    load_train=lambda _: TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)),
    load_test=lambda _: None,
    loss=nn.functional.cross_entropy,
)


def tensors_of(examples: Examples | None) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a data set that holds tensors."""
    assert isinstance(examples, TensorDataset)
    return examples.tensors[0], examples.tensors[1]


def to_idx(array: NDArray[np.uint8]) -> bytes:
    """Write the idx format down: two zeros, 8, dimensions, sizes big-endian, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_raw(
    root: Path, folder: str = "MNIST", *, prefix: str = "train", num: int = 20, packed: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write a small data set in torchvision's layout; return its images and labels."""
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
    labels = rng.permutation(np.arange(num, dtype=np.uint8) % 10)
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        content = to_idx(array)
        if packed:
            (raw / f"{prefix}-{kind}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / f"{prefix}-{kind}").write_bytes(content)
    return images, labels


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make every download fail, and look for earlier downloads in an empty folder."""

    def refuse(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(datasets, "_download_by_torchvision", refuse)
    monkeypatch.setattr(datasets, "DOWNLOAD_ROOT", tmp_path / "cache")


def test_the_bundled_sample_has_as_many_of_each_digit() -> None:
    for split, num_per_class in (("train", 1000), ("test", 200)):
        data = load_images("mnist-sample", split)  # type: ignore[arg-type]  # one of two literals
        assert data.images.shape == (10 * num_per_class, 28, 28)
        assert data.images.dtype == np.uint8
        assert np.bincount(data.labels).tolist() == [num_per_class] * 10
        assert not data.images.flags.writeable


def test_images_are_normalised_once() -> None:
    """Black is (0 - 0.1307) / 0.3081 and white (1 - 0.1307) / 0.3081; the mean is about 0."""
    images, labels = tensors_of(to_dataset(load_images("mnist-sample", "train")))
    assert images.shape == (10_000, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.min().item() == pytest.approx(-0.42421, abs=1e-4)
    assert images.max().item() == pytest.approx(2.82149, abs=1e-4)
    assert images.mean().item() == pytest.approx(0.0, abs=0.02)
    assert images.std().item() == pytest.approx(1.0, abs=0.02)


def test_the_sample_task_needs_neither_network_nor_data_root_nor_torchvision() -> None:
    """In a fresh process, so that nothing has been imported before."""
    code = (
        "import sys\n"
        "from fedrounds.tasks.builtin import find_task\n"
        "from fedrounds.tasks.task import DataRequest, Partition\n"
        "task = find_task('mnist-sample')\n"
        "train = task.load_train(DataRequest(partition=Partition(index=0, seed=0)))\n"
        "assert (len(train), len(task.load_test(None))) == (1000, 2000)\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_partitions_of_all_clients_are_the_whole_training_set() -> None:
    """Each image is in one share: the shares' pixels, sorted, are those of the whole."""
    task = find_task("mnist-sample")
    partition = Partition(num_partitions=1, index=0, seed=3)
    whole = tensors_of(task.load_train(DataRequest(partition=partition)))[0].flatten(1).sum(dim=1)
    partitions = [
        Partition(scheme="dirichlet", num_partitions=7, index=i, seed=3, parameters={"alpha": 0.3})
        for i in range(7)
    ]
    shares = [tensors_of(task.load_train(DataRequest(partition=p)))[0] for p in partitions]
    sums = torch.cat([share.flatten(1).sum(dim=1) for share in shares])
    assert torch.equal(sums.sort().values, whole.sort().values)


def test_a_partition_outside_the_range_is_refused() -> None:
    with pytest.raises(InvalidInput, match="partitions count from 0 to 9"):
        Partition(index=10, seed=0)


@pytest.mark.parametrize("packed", [False, True])
def test_local_data_is_everything_under_the_data_root(tmp_path: Path, packed: bool) -> None:
    """Training files alone suffice; normalised by Fashion-MNIST's 0.2860 and 0.3530."""
    images, labels = write_raw(tmp_path, "FashionMNIST", packed=packed)
    task = find_task("fashion-mnist")
    inputs, targets = tensors_of(task.load_train(DataRequest(data_root=tmp_path)))
    expected = (images[:, None].astype(np.float64) / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-5)
    assert targets.tolist() == labels.tolist()


def test_mnist_files_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    """The reader is our own; torchvision's is the oracle."""
    from torchvision.datasets import MNIST

    for prefix in ("train", "t10k"):
        write_raw(tmp_path, prefix=prefix, num=30)
    own = load_images("mnist", "test", data_root=tmp_path)
    expected = MNIST(str(tmp_path), train=False, download=False)
    assert np.array_equal(own.images, expected.data.numpy())
    assert own.labels.tolist() == expected.targets.tolist()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("with_root", [False, True])
def test_data_that_cant_be_had_names_both_ways_out(tmp_path: Path, with_root: bool) -> None:
    request = DataRequest(
        data_root=tmp_path / "mine" if with_root else None, partition=Partition(index=0, seed=0)
    )
    with pytest.raises(DataUnavailable, match=r"--data-root .* or connect to the internet"):
        find_task("mnist").load_train(request)
    assert not (tmp_path / "mine").exists(), "a mistyped --data-root leaves no folder behind"


def test_a_download_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt breaks off half way; the second finds nothing left of it and works."""
    attempts = []

    def download(_: object, root: Path) -> None:
        attempts.append(root)
        write_raw(root, prefix="train")
        if len(attempts) == 1:
            raise RuntimeError("connection reset")
        write_raw(root, prefix="t10k", num=10)

    monkeypatch.setattr(datasets, "_download_by_torchvision", download)
    with pytest.raises(DataUnavailable, match="connection reset"):
        find_task("mnist").load_test(tmp_path)
    assert not (tmp_path / "MNIST").exists()

    assert len(tensors_of(find_task("mnist").load_test(tmp_path))[0]) == 10
    partition = Partition(num_partitions=2, index=0, seed=0)
    train = find_task("mnist").load_train(DataRequest(data_root=tmp_path, partition=partition))
    assert len(tensors_of(train)[0]) == 10
    assert len(attempts) == 2


def test_a_client_with_its_own_data_never_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public images in place of missing private images would be worse than an error."""

    def download(_: object, root: Path) -> None:
        pytest.fail("downloaded")

    monkeypatch.setattr(datasets, "_download_by_torchvision", download)
    with pytest.raises(DataUnavailable, match=r"no train files under .*pass --data-root"):
        find_task("mnist").load_train(DataRequest(data_root=tmp_path))
    with pytest.raises(InvalidInput, match="local data needs --data-root"):
        find_task("mnist").load_train(DataRequest())


def test_the_bundled_sample_is_nobodys_own_data() -> None:
    """All of it, beside the others' shares of it, would be a client that knows everybody's data."""
    with pytest.raises(InvalidInput, match="leave --source local out"):
        find_task("mnist-sample").load_train(DataRequest())


@pytest.mark.parametrize("name", ["text", "tabular,label=a,features=b,classes=2"])
def test_a_data_root_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    task = find_task(name)
    for root, what in ((tmp_path / "file", "is no folder"), (tmp_path / "no", "doesn't exist")):
        with pytest.raises(DataUnavailable, match=f"--data-root {root} {what}"):
            task.load_train(DataRequest(data_root=root))


def test_the_own_task_of_the_examples_asks_for_its_folder() -> None:
    with pytest.raises(InvalidInput, match="task 'waves' needs --data-root"):
        find_task("examples.own_task.waves:waves").load_train(DataRequest())


def test_a_folder_named_as_an_image_file_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataUnavailable, match=f"{path} can't be read: Is a directory; let"):
        find_task("mnist").load_train(DataRequest(data_root=tmp_path))


def test_a_data_root_is_never_ignored(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is bundled and would ignore"):
        find_task("mnist-sample").load_train(DataRequest(data_root=tmp_path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no idx file"),
        (b"\x1f\x8b\x08\x00", "no idx file"),
        (b"\x00\x00\x08\x03\x00\x00", "damaged"),
        (to_idx(np.zeros((2, 28, 28), np.uint8))[:-1], "promises 1568 bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    write_raw(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InvalidInput, match=f"train-images-idx3-ubyte .*{complaint}"):
        find_task("mnist").load_train(DataRequest(data_root=tmp_path))


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path)
    label_file = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    label_file.write_bytes(to_idx(np.zeros(19, np.uint8)))
    with pytest.raises(InvalidInput, match="20 images but 19 labels"):
        find_task("mnist").load_train(DataRequest(data_root=tmp_path))


def test_the_model_depends_on_the_global_generator_alone() -> None:
    build = find_task("mnist-sample").build_model
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build().state_dict()["fc1.weight"])
    assert isinstance(build(), SimpleCNN)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_users_own_task_is_found_by_module_and_attribute() -> None:
    task = find_task(f"{__name__}:OWN_TASK")
    assert task is sys.modules[__name__].OWN_TASK
    assert task.load_test(None) is None


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("mnits", "there are: mnist-sample, mnist, fashion-mnist, text, tabular; a task of your"),
        (":x", "there is no task"),
        ("no_such_module:task", "importing no_such_module failed"),
        (".x:y", "'.x' is no module's name"),
        ("breast.py:breast", "'breast.py' is a file, .*: write breast instead, without .py"),
        ("./tasks/breast.py:breast", "write tasks.breast instead"),
        (
            "raises:task",
            r"^task 'raises:task': importing raises raised RuntimeError: boom "
            r"\(raises.py, line 4\)$",
        ),
        ("ends:task", r"importing ends raised SystemExit: 3 \(ends.py, line 1\)$"),
        ("half_a_task:task", r"half_a_task can't be read: .*half_a_task.py, line 2"),
        (f"{__name__}:MISSING", "has no MISSING; the tasks in it are: OWN_TASK"),
        (f"{__name__}:write_raw", "is a function, not a fedrounds.Task"),
    ],
)
def test_an_unknown_task_says_what_there_is(
    name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_a_task.py").write_text("import torch\ntask = =\n")
    (tmp_path / "raises.py").write_text("def f():\n  raise RuntimeError('boom')\n\nf()\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match=complaint):
        find_task(name)


def test_load_data_is_iid_or_really_is_not() -> None:
    """IID: every client has all ten digits, each 64 to 136 of 1,000 (3.8 standard deviations).

    Not IID: 20 shards of 500 from 1,000 of each digit, so at most two digits a client.
    """
    for iid in (True, False):
        loaders, test_loader = load_data(iid=iid, num_clients=10, batch_size=64)
        assert sum(len(labels) for _, labels in test_loader) == 2000
        assert len(loaders) == 10
        for loader in loaders:
            counts = torch.cat([labels for _, labels in loader]).bincount(minlength=10)
            assert counts.sum() == 1000
            if iid:
                assert counts.min() >= 64
                assert counts.max() <= 136
            else:
                assert torch.count_nonzero(counts) <= 2


def test_load_data_gives_each_client_its_own_order_and_repeats_it() -> None:
    """Shares are of one size, so equal streams would show as equal positions."""

    def first_positions(seed: int) -> list[list[int]]:
        loaders, _ = load_data(num_clients=2, batch_size=32, seed=seed)
        return [list(next(iter(loader.sampler))) for loader in loaders]

    assert first_positions(1) == first_positions(1)
    assert first_positions(1) != first_positions(2)
    assert first_positions(1)[0] != first_positions(1)[1]


def test_an_error_of_build_model_names_the_task() -> None:
    def fail() -> nn.Module:
        raise ValueError("no such layer")

    with pytest.raises(OwnCodeFailed, match="task 'own': build_model failed with ValueError: no"):
        build_model(replace(OWN_TASK, build_model=fail))


class Endless(IterableDataset[int]):
    """Examples whose number nobody knows."""

    def __iter__(self) -> Iterator[int]:
        """Yield them."""
        return itertools.count()


@pytest.mark.parametrize(
    "examples",
    [None, iter([1]), {1, 2}, DataLoader(Endless())],
    ids=["none", "iterator", "set", "loader"],
)
def test_what_is_no_data_set_is_refused(examples: object) -> None:
    with pytest.raises(InvalidInput, match=r"load_train returned a .* must return a data set"):
        count_examples(OWN_TASK, examples, loaded_by="load_train")


@pytest.mark.parametrize(
    ("example", "described"),
    [
        (torch.zeros(2), "a Tensor"),
        ({"x": 1, "y": 2}, "a dict"),
        ((torch.zeros(2), 0, 1), r"\(Tensor, int, int\)"),
    ],
)
def test_what_is_no_example_is_refused(example: object, described: str) -> None:
    with pytest.raises(InvalidInput, match=f"first of the data set is {described}; for other"):
        validate_example(OWN_TASK, example)


@pytest.mark.parametrize(
    "example",
    [(torch.zeros(2), 1), [np.zeros(2), np.int64(1)], (0.5, True), ({"a": "text", "b": 1}, 0)],
    ids=str,
)
def test_an_example_may_be_of_tensors_arrays_numbers_or_strings(example: object) -> None:
    validate_example(OWN_TASK, example)


def test_an_example_that_no_batch_can_hold_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"\(NoneType, int\), holds a NoneType$"):
        validate_example(OWN_TASK, (None, 1))

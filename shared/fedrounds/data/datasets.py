"""The built-in image data sets: their files, and their conversion to tensors.

`mnist-sample` is beside this file. `mnist` and `fashion-mnist` are read
from a data root in torchvision's layout (`MNIST/raw/train-images-idx3-ubyte`, or the same with
`.gz`). The idx format is four lines to read, so torchvision, which costs a second and 100 MB to
import and insists on training and test files both, is imported for downloading only.
"""

import functools
import gzip
import math
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fedrounds.data.folders import unreadable
from fedrounds.errors import DataUnavailable, InvalidInput

Split = Literal["train", "test"]

SAMPLE_PATH = Path(__file__).with_name("mnist_sample.npz")
DOWNLOAD_ROOT = Path.home() / ".cache" / "fedrounds" / "data"

_FILE_PREFIX = {"train": "train", "test": "t10k"}
_DOWNLOAD_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ImageClassificationData:
    """Images and labels as they lie on disk, with the numbers that normalise them.

    `images` uint8 [n, height, width]; `labels` int64 [n]; `mean` and `std` of the training
    pixels on the scale 0..1. Both arrays are read-only, so that they can be shared.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    mean: float
    std: float

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise InvalidInput(
                f"{len(self.images)} images but {len(self.labels)} labels; the files don't "
                f"belong together"
            )
        self.images.flags.writeable = False
        self.labels.flags.writeable = False


@dataclass(frozen=True)
class _IdxSource:
    """A data set published as four idx files: its folder, torchvision's class, its pixels."""

    folder: str
    torchvision_class: str
    mean: float
    std: float


_IDX_SOURCES = {
    "mnist": _IdxSource("MNIST", "MNIST", mean=0.1307, std=0.3081),
    "fashion-mnist": _IdxSource("FashionMNIST", "FashionMNIST", mean=0.2860, std=0.3530),
}


def load_images(
    name: str, split: Split, *, data_root: Path | None = None, may_download: bool = False
) -> ImageClassificationData:
    """Read one split of a built-in data set.

    `may_download` allows fetching public files that aren't there, into `data_root` or, without
    one, into `~/.cache/fedrounds/data`.

    Raises:
        InvalidInput: unknown name, a damaged file, or a data root for the bundled sample,
            which would be ignored.
        DataUnavailable: the files are neither there nor to be had.
    """
    if name == "mnist-sample":
        if data_root is not None:
            raise InvalidInput(
                f"mnist-sample is bundled and would ignore the data root {data_root}; leave "
                f"--data-root out, or choose the task mnist"
            )
        return _load_sample(split)
    if name not in _IDX_SOURCES:
        known = ", ".join(("mnist-sample", *_IDX_SOURCES))
        raise InvalidInput(f"there is no data set {name!r}; there are: {known}")
    source = _IDX_SOURCES[name]
    root = data_root if data_root is not None else DOWNLOAD_ROOT
    paths = _find_files(source, split, root)
    if paths is None and may_download:
        _download(name, source, root)
        paths = _find_files(source, split, root)
    if paths is None:
        prefix = _FILE_PREFIX[split]
        raise DataUnavailable(
            f"{name}: no {split} files under {root / source.folder / 'raw'}; pass --data-root "
            f"with {source.folder}/raw/{prefix}-images-idx3-ubyte and -labels-idx1-ubyte in it "
            f"(torchvision's layout, .gz allowed)"
        )
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.ndim != 1:
        raise InvalidInput(
            f"{paths[0]} has shape {images.shape} and {paths[1]} {labels.shape}, not "
            f"[n, height, width] and [n]"
        )
    return ImageClassificationData(
        images=images, labels=labels.astype(np.int64), mean=source.mean, std=source.std
    )


def to_dataset(
    data: ImageClassificationData, indices: NDArray[np.int64] | None = None
) -> TensorDataset:
    """Return the chosen examples (None: all) as tensors, normalised once.

    Images float32 [n, 1, height, width] = (pixel / 255 - mean) / std; labels int64 [n].
    """
    chosen = slice(None) if indices is None else indices
    images = torch.from_numpy(data.images[chosen].astype(np.float32)).unsqueeze(1)
    images.div_(255.0).sub_(data.mean).div_(data.std)
    return TensorDataset(images, torch.from_numpy(data.labels[chosen].copy()))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array of bytes in the idx format of LeCun's MNIST page, plain or `.gz`.

    Layout: 0, 0, type code (8: unsigned byte), number of dimensions; each dimension as a
    big-endian uint32; then the bytes, last dimension fastest.

    Raises:
        InvalidInput: another format, or not as many bytes as the header promises.
        DataUnavailable: the file can't be read.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path} is damaged ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(error, path) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InvalidInput(f"{path} is no idx file of unsigned bytes: it starts {content[:4]!r}")
    header_bytes = 4 + 4 * content[3]
    if len(content) < header_bytes:
        raise InvalidInput(f"{path} is damaged: it ends within its header; fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:header_bytes])
    body_bytes = len(content) - header_bytes
    if body_bytes != math.prod(shape):
        raise InvalidInput(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of data {shape}, "
            f"but {body_bytes} follow; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


# One process may serve many clients, and each cuts its share out of the same 9 MB.
@functools.cache
def _load_sample(split: Split) -> ImageClassificationData:
    with np.load(SAMPLE_PATH) as arrays:
        return ImageClassificationData(
            images=arrays[f"{split}_images"],
            labels=arrays[f"{split}_labels"].astype(np.int64),
            mean=_IDX_SOURCES["mnist"].mean,
            std=_IDX_SOURCES["mnist"].std,
        )


def _find_files(source: _IdxSource, split: Split, root: Path) -> tuple[Path, Path] | None:
    raw = root / source.folder / "raw"
    paths = []
    try:
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            plain = raw / f"{_FILE_PREFIX[split]}-{kind}"
            path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
            if not path.exists():
                return None
            paths.append(path)
    except OSError as error:
        raise unreadable(error, root) from error
    return paths[0], paths[1]


def _download(name: str, source: _IdxSource, root: Path) -> None:
    """Fetch all four files by torchvision, seen by others only when complete."""
    lock, is_new = root / f".{source.folder}.lock", not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Several clients start at once on one machine; one downloads, the others wait for it.
        with FileLock(lock):
            if all(_find_files(source, split, root) for split in ("train", "test")):
                return
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as fresh:
                _download_by_torchvision(source, Path(fresh))
                target = root / source.folder / "raw"
                target.mkdir(parents=True, exist_ok=True)
                for path in (Path(fresh) / source.folder / "raw").iterdir():
                    path.replace(target / path.name)
    # URLError and timeouts are OSErrors; torchvision's own 'no mirror worked' is a RuntimeError
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if is_new:
            # It may be a mistyped --data-root. Another client's files keep it where it is.
            with suppress(OSError):
                lock.unlink(missing_ok=True)
                root.rmdir()
        raise DataUnavailable(
            f"{name}: not under {root}, and downloading it there failed ({reason}); either pass "
            f"--data-root with the files in torchvision's layout ({source.folder}/raw/"
            f"train-images-idx3-ubyte and so on), or connect to the internet and start again"
        ) from error


def _download_by_torchvision(source: _IdxSource, root: Path) -> None:
    import torchvision.datasets  # noqa: PLC0415  see the module's docstring

    with _socket_timeout(_DOWNLOAD_TIMEOUT_S):
        getattr(torchvision.datasets, source.torchvision_class)(root=str(root), download=True)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torchvision passes no timeout to urllib, so a silent network would hang the client.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Changing inputs at random, so that a model sees each example in more than one way."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from fedrounds.errors import InvalidInput

_MAX_SHIFT = 2


class AugmentedBatches:
    """The batches of `loader` with inputs changed at random; as long, and in the same order.

    Every pass draws other changes, from a stream of its own that begins at `seed`.

    Raises:
        InvalidInput: no augmentation of this name, or (on the way) inputs it isn't made for.
    """

    def __init__(self, loader: DataLoader[Any], *, name: str, seed: int) -> None:
        if name not in AUGMENTATIONS:
            raise InvalidInput(
                f"there is no augmentation {name!r}; there are: none, {', '.join(AUGMENTATIONS)}"
            )
        self._loader = loader
        self._change = AUGMENTATIONS[name]
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def newest_indices(self) -> list[int] | None:
        """The numbers in the data set, from 0, of the newest batch's examples, if known."""
        return getattr(self._loader, "newest_indices", None)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            if not isinstance(batch, tuple | list) or not isinstance(batch[0], Tensor):
                raise InvalidInput(
                    "an augmentation is for batches of (inputs, targets) with one tensor of "
                    "inputs; leave --augment out"
                )
            inputs, *rest = batch
            yield self._change(inputs, self._generator), *rest


def shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images [n, channels, height, width], each moved by up to 2 pixels either way.

    What comes in at an edge repeats the pixels there. Each image moves by its own draw of
    (down, right), uniform over -2..2 each.

    Raises:
        InvalidInput: not images.
    """
    if images.ndim != 4:
        raise InvalidInput(
            f"the augmentation shift is for images [n, channels, height, width], but the inputs "
            f"are {tuple(images.shape)}; leave --augment out"
        )
    num, _, height, width = images.shape
    padded = F.pad(images, [_MAX_SHIFT] * 4, mode="replicate")
    begin = torch.randint(2 * _MAX_SHIFT + 1, (2, num, 1), generator=generator)
    rows = begin[0] + torch.arange(height)
    columns = begin[1] + torch.arange(width)
    image = torch.arange(num)[:, None, None]
    # The indexed dimensions come first: [n, height, width, channels].
    moved = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = MappingProxyType(
    {"shift": shift_images}
)

"""Augmentation moves images, keeps what they are, and repeats."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from fedrounds.data import AugmentedBatches, make_loader
from fedrounds.data.augmentation import shift_images
from fedrounds.errors import InvalidInput

IMAGES = torch.arange(40 * 28 * 28, dtype=torch.float32).reshape(40, 1, 28, 28)
LABELS = torch.arange(40)


def augmented(seed: int) -> AugmentedBatches:
    """Return batches of 16 of the images, always in the same order."""
    loader = make_loader(TensorDataset(IMAGES, LABELS), batch_size=16, shuffle=False)
    return AugmentedBatches(loader, name="shift", seed=seed)


def images_of(batches: AugmentedBatches) -> Tensor:
    """Return all images of one pass."""
    return torch.cat([images for images, _ in batches])


def moved_by_hand(image: Tensor, down: int, right: int) -> Tensor:
    """Return the image [c, h, w] moved, pixel by pixel, edges repeated."""
    _, height, width = image.shape
    moved = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            source = (min(max(row - down, 0), height - 1), min(max(column - right, 0), width - 1))
            moved[:, row, column] = image[:, source[0], source[1]]
    return moved


@given(
    num=st.integers(1, 3),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_every_image_is_moved_by_up_to_two_pixels(
    num: int, channels: int, height: int, width: int, seed: int
) -> None:
    """Each result is among the 25 that moving pixel by pixel gives; shape and type stay."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, channels, height, width, generator=generator)
    shifted = shift_images(images, generator)
    assert (shifted.shape, shifted.dtype) == (images.shape, images.dtype)
    assert shifted.is_contiguous()
    for before, after in zip(images, shifted, strict=True):
        ways = [moved_by_hand(before, d, r) for d in range(-2, 3) for r in range(-2, 3)]
        assert any(torch.equal(after, way) for way in ways)


def test_all_ways_to_move_occur_equally_often() -> None:
    """2,500 images with one bright pixel: each of 25 places 100 times, give or take 6 sigma.

    The bright pixel is in the middle of 5 x 5, so that its position shows the move.
    """
    images = torch.zeros(2500, 1, 5, 5)
    images[:, :, 2, 2] = 1
    shifted = shift_images(images, torch.Generator().manual_seed(3))
    counts = shifted.sum(dim=(0, 1))
    assert counts.sum() == 2500
    assert counts.min() > 40
    assert counts.max() < 160


def test_labels_stay_with_their_images() -> None:
    """Pixel values name the image they are from: label k's lie in [784 k, 784 (k + 1))."""
    batches = augmented(seed=1)
    assert len(batches) == 3
    for images, labels in batches:
        owners = (images.flatten(1) // 784).to(torch.int64)
        assert torch.equal(owners.amin(dim=1), labels)
        assert torch.equal(owners.amax(dim=1), labels)


def test_changes_are_seeded_and_another_set_in_each_pass() -> None:
    state = torch.get_rng_state()
    first, again, other = augmented(1), augmented(1), augmented(2)
    first_pass = images_of(first)
    assert torch.equal(first_pass, images_of(again))
    assert torch.equal(images_of(first), images_of(again))
    assert not torch.equal(first_pass, images_of(first))
    assert not torch.equal(first_pass, images_of(other))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_isnt_there_or_no_image_is_refused() -> None:
    loader = make_loader(TensorDataset(torch.zeros(4, 3), torch.zeros(4)), batch_size=2, seed=0)
    with pytest.raises(InvalidInput, match="there are: none, shift"):
        AugmentedBatches(loader, name="flip", seed=0)
    with pytest.raises(InvalidInput, match=r"the inputs are \(2, 3\); leave --augment out"):
        list(AugmentedBatches(loader, name="shift", seed=0))

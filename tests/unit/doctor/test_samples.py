"""The failing set: all bad samples and no good samples, in few tries; and what looks odd."""

from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrounds.diagnosis.values import Oddity
from fedrounds.doctor.batches import (
    Batch,
    batch_size,
    inputs_of,
    labels_of,
    take,
    tensors_of,
)
from fedrounds.doctor.samples import failing_samples, oddities


def numbered(count: int) -> Tensor:
    """Return a batch whose samples are their own positions, none of them odd."""
    return torch.arange(count)


def positions_of(batch: Batch) -> set[int]:
    """Return which samples of `numbered` these are."""
    assert isinstance(batch, Tensor)
    return set(batch.tolist())


class Oracle:
    """Says what fails and counts how often it was asked."""

    def __init__(self, is_failing: Callable[[set[int]], bool]) -> None:
        self.is_failing = is_failing
        self.num_calls = 0

    def __call__(self, batch: Batch) -> bool:
        """Answer for this part of the batch."""
        self.num_calls += 1
        return self.is_failing(positions_of(batch))


@st.composite
def bad_sets(draw: st.DrawFn) -> tuple[int, set[int]]:
    """Draw a batch's size and its bad samples: one of them, or up to a quarter."""
    count = draw(st.integers(2, 40))
    num_bad = draw(st.integers(1, max(1, count // 4)))
    return count, draw(st.sets(st.integers(0, count - 1), min_size=num_bad, max_size=num_bad))


@given(bad_sets())
@settings(max_examples=400, deadline=None)
def test_all_that_fail_alone_are_found_and_nothing_else(drawn: tuple[int, set[int]]) -> None:
    """Whatever the size, up to a quarter of it bad, nothing odd to be seen, within 64 tries."""
    count, bad = drawn
    oracle = Oracle(lambda positions: bool(positions & bad))
    assert set(failing_samples(numbered(count), oracle)) == bad
    assert oracle.num_calls <= 64


@given(bad_sets(), st.data())
@settings(max_examples=200, deadline=None)
def test_suspects_are_a_hint_and_never_believed(
    drawn: tuple[int, set[int]], data: st.DataObject
) -> None:
    """Suspected samples, rightly or wrongly, change the number of tries and not the answer."""
    count, bad = drawn
    suspects = data.draw(st.lists(st.integers(-1, count), unique=True))
    failing = failing_samples(
        numbered(count), lambda batch: bool(positions_of(batch) & bad), suspects=suspects
    )
    assert set(failing) == bad


@given(st.integers(8, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_beside_samples_that_go_well_each_is_judged_where_none_can_be_alone(
    count: int, data: st.DataObject
) -> None:
    """As under BatchNorm, whose single sample always fails: an eighth may be bad."""
    bad = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=max(1, count // 8)))
    failing = failing_samples(
        numbered(count),
        lambda batch: len(positions_of(batch)) < 2 or bool(positions_of(batch) & bad),
        suspects=data.draw(st.sampled_from([[], sorted(bad), [0, 1, *sorted(bad)]])),
    )
    assert set(failing) == bad


@given(st.integers(4, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_a_combination_is_found_and_made_small(count: int, data: st.DataObject) -> None:
    """Two or three samples that fail only together: exactly these."""
    together = data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=3))
    failing = failing_samples(
        numbered(count), lambda batch: together <= positions_of(batch), max_tries=200
    )
    assert set(failing) == together


@pytest.mark.parametrize("count", [2, 3, 8, 32, 100])
def test_it_is_not_the_samples(count: int) -> None:
    """Every part fails, or none does: no sample is accused, and it doesn't take long."""
    always, never = Oracle(lambda _: True), Oracle(lambda positions: len(positions) == count)
    assert failing_samples(numbered(count), always) == ()
    assert failing_samples(numbered(count), never) == ()
    assert always.num_calls <= 18
    assert never.num_calls <= 30


def test_a_batch_of_one_cannot_be_divided() -> None:
    """Whether the sample or the step is at fault can't be known, so it isn't tried."""
    oracle = Oracle(lambda _: True)
    assert failing_samples(numbered(1), oracle) == ()
    assert oracle.num_calls == 0


@pytest.mark.parametrize(
    ("bad", "odd", "most"),
    [({7}, [7], 2), ({7, 8}, [7, 8], 5), ({7}, [3, 7], 6), ({7}, [], 11), ({1, 15, 30}, [], 26)],
)
def test_how_often_a_step_is_tried(bad: set[int], odd: list[int], most: int) -> None:
    """Of 32 samples: two tries for a sample that looks odd, a few more for the rest."""
    oracle = Oracle(lambda positions: bool(positions & bad))
    assert set(failing_samples(numbered(32), oracle, suspects=odd)) == bad
    assert oracle.num_calls <= most


def test_out_of_tries_what_is_proven_is_returned() -> None:
    """Never more calls than allowed, and never a sample that wasn't seen to fail."""
    bad = set(range(0, 64, 2))
    for max_tries in (1, 3, 10, 20):
        oracle = Oracle(lambda positions: bool(positions & bad))
        assert set(failing_samples(numbered(64), oracle, max_tries=max_tries)) <= bad
        assert oracle.num_calls <= max_tries


def test_a_real_network_with_batchnorm_and_a_pixel_of_1e20() -> None:
    """What looks odd within the batch alone is asked first; the planted sample is named."""
    torch.manual_seed(0)
    images, labels = torch.rand(16, 1, 4, 4), torch.randint(0, 3, (16,))
    images[5, 0, 2, 2] = 1e20
    num_calls = 0

    def fails(batch: Batch) -> bool:
        nonlocal num_calls
        num_calls += 1
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )
        inputs, targets = tensors_of(batch)
        try:
            loss = nn.functional.cross_entropy(model(inputs), targets)
        except ValueError:
            return True
        return not all(value.isfinite().all() for value in [loss, *model.state_dict().values()])

    assert fails((images, labels))
    num_calls = 0
    assert failing_samples((images, labels), fails) == (5,)
    assert num_calls == 2


def test_a_batch_keeps_its_kind() -> None:
    """Tensors, tuples, named tuples, lists and dicts; what has no row a sample stays."""
    pair = namedtuple("pair", ["inputs", "labels"])
    inputs, labels, scale = torch.rand(4, 2), torch.arange(4), torch.tensor(3.0)
    assert torch.equal(take(inputs, [2, 0]), inputs[[2, 0]])
    for batch in (pair(inputs, labels), (inputs, labels), [inputs, labels]):
        taken = take(batch, [3])
        assert type(taken) is type(batch)
        assert [tensor.tolist() for tensor in tensors_of(taken)] == [inputs[3:].tolist(), [3]]
    named = take({"x": inputs, "scale": scale, "y": labels}, [1, 2])
    assert isinstance(named, dict)
    assert list(named) == ["x", "scale", "y"]
    assert named["y"].tolist() == [1, 2]
    assert named["scale"] is scale


def test_inputs_and_labels_are_distinguished() -> None:
    """Floating tensors are inputs; the last integer tensor with a row a sample is labels."""
    images, tokens = torch.rand(3, 2), torch.zeros(3, 5, dtype=torch.int64)
    mask, labels = torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 2])
    batch: Batch = (images, tokens, labels, mask, torch.arange(7))
    assert batch_size(batch) == 3
    assert [tensor is images for tensor in inputs_of(batch)] == [True]
    assert labels_of(batch) is labels
    assert labels_of(images) is None
    assert batch_size(torch.tensor(1.0)) == 1


def odd_of(batch: Batch, healthy: list[Batch], num_classes: int | None = 10) -> dict[int, Oddity]:
    """Return the oddity of each odd sample."""
    odd = oddities(batch, num_classes=num_classes, healthy=healthy)
    assert all(sample.position == position for position, sample in odd.items())
    return {position: sample.oddity for position, sample in odd.items()}


def digits(count: int = 32, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return pictures like MNIST's: mostly 0, many exactly 1; and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, 1, 8, 8, generator=generator) * 4 - 2).clamp(0, 1)
    return images, torch.randint(0, 10, (count,), generator=generator)


def test_each_oddity_is_named() -> None:
    """NaN and infinity with their number, labels without, an outlier in deviations, an empty."""
    images, labels = digits()
    images[3, 0, 0, :2] = float("nan")
    images[4, 0, 0, :3] = -float("inf")
    images[5, 0, 1, 1] = -1e20
    images[6] = 0
    labels[7], labels[8], labels[9] = 10, -1, -100
    healthy: list[Batch] = [digits(seed=1)]
    odd = oddities((images, labels), num_classes=10, healthy=healthy)
    assert {position: (sample.oddity, sample.value) for position, sample in odd.items()} == {
        3: (Oddity.NAN, 2.0),
        4: (Oddity.INFINITY, 3.0),
        # Every picture's largest pixel is 1, so the deviation is its least, a tenth of that.
        5: (Oddity.OUTLIER, pytest.approx(1e21)),
        6: (Oddity.EMPTY, 0.0),
        7: (Oddity.LABEL_OUT_OF_RANGE, 0.0),
        8: (Oddity.LABEL_OUT_OF_RANGE, 0.0),
    }
    assert odd_of((images, labels), healthy, num_classes=None).keys() == {3, 4, 5, 6}


@pytest.mark.parametrize("with_healthy", [True, False])
@pytest.mark.parametrize("kind", ["digits", "one-hot", "lognormal", "cauchy-columns", "sparse"])
def test_sane_data_are_not_odd(kind: str, with_healthy: bool) -> None:
    """Constant pixels, one-hot rows, heavy tails, rows that are mostly zero: nothing to say."""
    generator = torch.Generator().manual_seed(2)

    def make(count: int) -> Tensor:
        normal = torch.randn(count, 6, generator=generator)
        match kind:
            case "digits":
                return digits(count)[0]
            case "one-hot":
                return torch.eye(10)[torch.randint(0, 10, (count,), generator=generator)]
            case "lognormal":
                return (1.5 * normal).exp()
            case "cauchy-columns":
                return normal / torch.randn(count, 6, generator=generator).abs().clamp(min=0.1)
        return normal * (torch.rand(count, 6, generator=generator) < 0.05)

    for _ in range(20):
        healthy: list[Batch] = [make(32) for _ in range(8)] if with_healthy else []
        assert odd_of(make(32), healthy) == {}


def test_outliers_need_both_deviations_and_size() -> None:
    """Nine times the largest healthy value isn't one, eleven times is; of half a batch too."""
    generator = torch.Generator().manual_seed(3)
    healthy: list[Batch] = [torch.rand(32, 5, generator=generator) for _ in range(4)]
    largest = max(float(tensors_of(batch)[0].max()) for batch in healthy)
    batch = torch.rand(32, 5, generator=generator)
    batch[2, 0] = 9 * largest
    batch[16:, 1] = 11 * largest
    assert odd_of(batch, healthy) == dict.fromkeys(range(16, 32), Oddity.OUTLIER)


def test_empty_samples_are_ordinary_where_healthy_samples_were_empty() -> None:
    """Silence in a data set that has some isn't odd; without anything healthy nobody knows."""
    batch, silence = torch.rand(4, 3), torch.zeros(2, 3)
    batch[1] = 0
    assert odd_of(batch, []) == {}
    assert odd_of(batch, [silence]) == {}
    assert odd_of(batch, [torch.rand(4, 3)]) == {1: Oddity.EMPTY}


def test_samples_in_lists_are_items_and_texts_go_with_their_samples() -> None:
    """Detection's batches are lists of images and of boxes; a text loader's hold lists of strings.

    Images of three channels look like three samples to whoever only sees the first dimension.
    """
    images = [torch.rand(3, 4, 4) for _ in range(5)]
    boxes = [{"boxes": torch.rand(number + 1, 4)} for number in range(5)]
    assert batch_size((images, boxes)) == 5
    some_images, some_boxes = take((images, boxes), [1, 4])
    assert [id(image) for image in some_images] == [id(images[1]), id(images[4])]
    assert [len(sample["boxes"]) for sample in some_boxes] == [2, 5]
    assert labels_of((images, boxes)) is None

    texts = {"text": ["a", "b", "c"], "id": torch.arange(3), "nothing": None, "task": "x"}
    assert take(texts, [0, 2])["text"] == ["a", "c"]
    assert take(texts, [0, 2])["task"] == "x"
    assert batch_size("nothing to be seen") == 1


def test_labels_are_known_by_their_name() -> None:
    """Hugging Face's collator puts labels first; the mask after them has whole numbers, too."""
    batch = {
        "labels": torch.tensor([1, 0]),
        "input_ids": torch.ones(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
    }
    assert labels_of(batch) is batch["labels"]
    assert labels_of(batch, num_classes=2) is batch["labels"]


def test_complex_inputs_are_looked_at_as_pairs() -> None:
    """A NaN in an imaginary part is odd."""
    signal = torch.zeros(8, 4, dtype=torch.complex64)
    torch.view_as_real(signal)[3, 1, 1] = torch.nan
    assert list(oddities((signal,), num_classes=None, healthy=())) == [3]

"""Compressors: bounds and means that the papers give, for any numbers; and what is sent of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fedrounds.tensors.compression import (
    compress,
    compressed_shapes,
    decompress,
    dequantise,
    largest,
    quantise,
    relative_error,
    restored,
)
from fedrounds.types import Compression, Encoding

COMPRESSIONS = [
    Compression(encoding=Encoding.FLOAT16),
    Compression(encoding=Encoding.BFLOAT16),
    Compression(encoding=Encoding.INT8, block_size=5),
    Compression(encoding=Encoding.TOP_K, fraction=0.3),
]

vectors = arrays.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-1e4, 1e4, width=32),
).map(torch.from_numpy)
anything = arrays.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
).map(torch.from_numpy)


def there_and_back(
    delta: dict[str, Tensor], compression: Compression, *, seed: int = 1
) -> dict[str, Tensor]:
    """Return what arrives of a delta; what is sent has the shapes that were announced."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in delta.items()}
    compressed = compress(delta, compression, seed=seed)
    announced = compressed_shapes(shapes, compression)
    assert {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in compressed.items()
    } == announced
    return decompress(compressed, shapes, compression)


@given(vectors, st.integers(1, 16), st.integers(0, 2**32))
def test_stochastic_rounding_is_unbiased(values: Tensor, block_size: int, seed: int) -> None:
    """The mean over draws is the value, and each draw is a level beside it.

    A draw is off by less than a scale s, with variance f (1 - f) s^2 <= s^2 / 4 (f is how far the
    value lies between two levels): the mean of 4096 draws is off by s / 128 at one standard
    deviation, and s / 20 is more than six.
    """
    num_draws = 4096
    block = values[:block_size]
    generator = torch.Generator().manual_seed(seed)
    draws, scales = quantise(block.repeat(num_draws), len(block), generator=generator)
    assert len(scales) == num_draws
    scale = float(scales[0])
    assert bool((scales == scale).all())
    decoded = draws.view(num_draws, len(block)).double() * scale
    assert scale * 127 >= float(block.abs().max())
    assert bool(((decoded - block.double()).abs() <= scale * (1 - 1e-12)).all()) or scale == 0
    assert bool(((decoded.mean(dim=0) - block.double()).abs() <= scale / 20).all())


@given(anything, st.floats(0.01, 1))
def test_top_k_contracts(values: Tensor, fraction: float) -> None:
    """||x - C(x)||^2 <= (1 - k/d) ||x||^2, and C(x) is x at k places and 0 elsewhere."""
    arrived = there_and_back(
        {"w": values}, Compression(encoding=Encoding.TOP_K, fraction=fraction)
    )["w"]
    kept = min(len(values), math.ceil(fraction * len(values)))
    is_kept = arrived == values
    assert int(is_kept.sum()) >= kept
    assert bool((arrived[~is_kept] == 0).all())
    # Of an independent sort: what is kept is as large as the k largest.
    order = np.argsort(-np.abs(values.numpy()), kind="stable")
    assert int((arrived != 0).sum()) <= kept
    assert bool((arrived[order[:kept].copy()] == values[order[:kept].copy()]).all())
    lost, whole = (float(vector.double().square().sum()) for vector in (values - arrived, values))
    assert lost <= (1 - kept / len(values)) * whole * (1 + 1e-12)


@pytest.mark.parametrize(
    ("encoding", "bits", "smallest"),
    # Half a unit in the last of 11 or 8 bits; below the normal numbers half the smallest one.
    [(Encoding.FLOAT16, 11, 2.0**-25), (Encoding.BFLOAT16, 8, 2.0**-134)],
)
@given(values=anything)
def test_a_cast_rounds_to_the_nearest_and_saturates(
    encoding: Encoding, bits: int, smallest: float, values: Tensor
) -> None:
    """Each value within half a unit in the last place; beyond the range, the largest number."""
    arrived = there_and_back({"w": values}, Compression(encoding=encoding))["w"].double()
    largest_number = 65504.0 if encoding is Encoding.FLOAT16 else (2 - 2**-7) * 2.0**127
    wanted = values.double().clamp(-largest_number, largest_number)
    assert bool(((arrived - wanted).abs() <= wanted.abs() * 2.0**-bits + smallest).all())


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.encoding)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_several_tensors_of_any_shape_and_precision(
    compression: Compression, dtype: torch.dtype
) -> None:
    """0-dim, empty and larger than a chunk of indices; as close as the encoding allows."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {"z": (3, 50_000), "a": (), "m": (0, 4), "b": (7,)}
    local = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    delta = {
        n: tensor.double() if dtype is torch.float64 else tensor.float()
        for n, tensor in local.items()
    }
    arrived = there_and_back(delta, compression)
    assert {n: (tensor.shape, tensor.dtype) for n, tensor in arrived.items()} == {
        n: (tensor.shape, tensor.dtype) for n, tensor in delta.items()
    }
    error = relative_error(delta, arrived)
    # Normal numbers: casts lose half a unit of 11 or 8 bits at most; the largest of five of them
    # is about 1.2, and a level 1.2 / 127; of all, the 30 % beyond 1.04 hold 78 % of the squares.
    bound = {
        Encoding.FLOAT16: 2.0**-11,
        Encoding.BFLOAT16: 2.0**-8,
        Encoding.INT8: 0.01,
        Encoding.TOP_K: 0.5,
    }[compression.encoding]
    assert error <= bound
    base = {n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}
    assert all(restored(base[n], arrived[n]).dtype is dtype for n in shapes)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.encoding)
def test_tied_weights_arrive_alike(compression: Compression) -> None:
    """The same numbers under two names are the same after it; others are rounded on their own.

    TOP_K may have no place for the second of its last two.
    """
    tied, other = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    arrived = there_and_back({"a": tied, "b": tied.clone(), "c": other}, compression)
    num_differing = int((arrived["a"] != arrived["b"]).sum())
    assert num_differing <= (compression.encoding is Encoding.TOP_K)
    doubled = there_and_back({"a": tied, "c": 2 * tied}, compression)
    if compression.encoding is Encoding.INT8:
        assert not torch.equal(2 * doubled["a"], doubled["c"])


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.encoding)
def test_the_same_arguments_give_the_same_bytes(compression: Compression) -> None:
    """Whatever was drawn before; only INT8 draws, and another seed rounds otherwise."""
    delta = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(2)), "b": torch.ones(3)}
    first = compress(delta, compression, seed=5)
    torch.rand(100)
    again = compress(dict(reversed(delta.items())), compression, seed=5)
    other = compress(delta, compression, seed=6)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    is_same = all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert is_same is (compression.encoding is not Encoding.INT8)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression.encoding)
def test_nothing_learned_is_sent_as_nothing(compression: Compression) -> None:
    """A delta of zeros arrives as zeros, without an error of 0 / 0."""
    delta = {"w": torch.zeros(11)}
    arrived = there_and_back(delta, compression)
    assert torch.equal(arrived["w"], delta["w"])
    assert relative_error(delta, arrived) == 0


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    """Which coordinates are sent doesn't depend on how a sort happens to go."""
    vector = torch.tensor([1.0, -2.0, 2.0, -1.0, 1.0])
    assert largest(vector, 3).tolist() == [0, 1, 2]
    assert largest(vector, 4).tolist() == [0, 1, 2, 3]
    assert largest(vector, 0).tolist() == []


def test_the_error_is_that_of_all_parameters_together() -> None:
    """Of (3, 4) and (12): the 4 lost of 13."""
    delta = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    arrived = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([12.0])}
    assert relative_error(delta, arrived) == 4 / 13


@pytest.mark.parametrize(
    "encoding", [encoding for encoding in Encoding if encoding is not Encoding.STATE_DICT]
)
def test_what_is_received_of_1e300_is_finite(encoding: Encoding) -> None:
    """A float64 delta beyond float32's range: scales, values and the error are numbers."""
    compression = Compression(encoding=encoding, block_size=4, fraction=0.5)
    delta = {"w": torch.tensor([1e300, -1e300, 1.0, 0.0, 1e-300], dtype=torch.float64)}
    compressed = compress(delta, compression, seed=1)
    assert all(bool(tensor.isfinite().all()) for tensor in compressed.values())
    received = decompress(compressed, {"w": (torch.float64, (5,))}, compression)
    assert bool(received["w"].isfinite().all())
    assert received["w"][0] > 0 > received["w"][1]
    lossless = encoding is Encoding.TOP_K
    assert relative_error(delta, received) == pytest.approx(0.0 if lossless else 1.0)


@pytest.mark.parametrize("largest_value", [1.8e38, torch.finfo(torch.float32).max, 1e300])
def test_int8_keeps_the_largest_numbers_of_float32(largest_value: float) -> None:
    """Up to 2^-23 of the largest; what is beyond float32 becomes it."""
    values = torch.tensor([largest_value, -largest_value, 0.0], dtype=torch.float64)
    rounded, scales = quantise(values, 8, generator=torch.Generator().manual_seed(0))
    received = dequantise(rounded, scales, begin=0, block_size=8)
    wanted = min(largest_value, torch.finfo(torch.float32).max)
    torch.testing.assert_close(
        received.double(),
        torch.tensor([wanted, -wanted, 0.0], dtype=torch.float64),
        rtol=2.0**-23,
        atol=0,
    )

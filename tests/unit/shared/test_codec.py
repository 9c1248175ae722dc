"""Bytes of a state_dict: what goes in comes out, and what isn't one is refused by name."""

import contextlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from fedrounds.errors import InvalidInput
from fedrounds.tensors.codec import (
    DTYPES,
    MAX_HEADER_BYTES,
    decode_state,
    digest_bytes,
    digest_file,
    encode_state,
    load_state_into,
    read_layout,
    write_state,
)
from tests.factories import TinyNet

# {"count": int64 7 (0-dim), "w": float32 [1, -2]} written down by hand: 8 bytes of header length
# (0x70 = 112), the header (wider dtypes first, then by name; padded with spaces to 8), the data.
GOLDEN = (
    "7000000000000000"
    + (
        b'{"count":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ).hex()
    + "20"
    + "0700000000000000"
    + "0000803f"
    + "000000c0"
)
GOLDEN_DIGEST = "cb52215359ef0df9e16456d2d5fb951ba5e6750e9cf97518dae8bdd8b285a575"


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, so that NaNs and zeros of either sign compare."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, shapes, dtypes and bytes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        assert actual[name].dtype == tensor.dtype
        assert bits(actual[name]) == bits(tensor), name


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw a tensor of any dtype and shape, contiguous or not, with any bytes in it."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(raw, dtype=dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else tensor


names = st.text(st.characters(codec="utf-8"), max_size=8).filter(
    lambda name: name != "__metadata__"
)


@given(state=st.dictionaries(names, tensors(), max_size=5))
def test_any_state_dict_comes_back_bit_for_bit(state: dict[str, Tensor]) -> None:
    """Names, shapes, dtypes and bytes survive encoding, for every dtype, 0-dim and empty too."""
    assert_same(decode_state(encode_state(state)), state)


@given(state=st.dictionaries(names, tensors(), min_size=2, max_size=5), data=st.data())
def test_the_bytes_do_not_depend_on_the_order_of_the_entries(
    state: dict[str, Tensor], data: st.DataObject
) -> None:
    """The same tensors give the same bytes in whatever order the mapping holds them."""
    shuffled = data.draw(st.permutations(list(state)))
    assert encode_state({name: state[name] for name in shuffled}) == encode_state(state)


def test_tensors_that_share_memory_are_written_under_each_name() -> None:
    """Tied weights, overlapping views, transposed and expanded tensors all come back whole."""
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": whole,
        "tied": whole,
        "head": whole[:2],
        "tail": whole[1:],
        "flipped": whole.t(),
        "column": whole[:, 1],
        "expanded": torch.ones(1).expand(5),
        "negated": torch._neg_view(torch.ones(2)),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    expected = {name: tensor.detach().resolve_neg().clone() for name, tensor in state.items()}
    assert expected["negated"].tolist() == [-1, -1]
    assert_same(decode_state(encode_state(state)), expected)


def test_the_wire_bytes_of_a_small_state_dict_are_pinned() -> None:
    """Bytes and digest stay what they are: files of today are read by the software of tomorrow."""
    state = {"w": torch.tensor([1.0, -2.0]), "count": torch.tensor(7)}
    assert encode_state(state).hex() == GOLDEN
    assert digest_bytes(bytes.fromhex(GOLDEN)) == GOLDEN_DIGEST
    assert_same(decode_state(bytes.fromhex(GOLDEN)), state)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(names, tensors(), max_size=4))
def test_a_state_dict_is_filled_from_the_file_it_was_written_to(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """The file holds the encoded bytes, and filling other tensors from it gives the same bits."""
    write_state(tmp_path / "file", state)
    assert (tmp_path / "file").read_bytes() == encode_state(state)
    filled = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    load_state_into(filled, tmp_path / "file")
    assert_same(filled, state)


def test_a_model_with_tied_weights_is_filled_in_place(tmp_path: Path) -> None:
    """The model's own tensors change, tied tensors stay tied, transposed tensors are filled too."""
    trained, model = TinyNet(), TinyNet()
    write_state(tmp_path / "file", trained.state_dict())
    load_state_into(model.state_dict(), tmp_path / "file")
    assert_same(model.state_dict(), trained.state_dict())
    assert model.head.weight is model.fc.weight
    flipped = torch.zeros(2, 3).t()
    write_state(tmp_path / "file", {"w": torch.arange(6.0).reshape(3, 2)})
    load_state_into({"w": flipped}, tmp_path / "file")
    assert flipped.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, "nothing in the model"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "'v': nothing in the file"),
        (
            {"w": torch.zeros(3)},
            r"first 'w': \[2\] torch.float32 in the file, \[3\] torch.float32 in the model",
        ),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "first 'w'"),
    ],
)
def test_a_model_is_not_filled_from_another_models_file(
    tmp_path: Path, other: dict[str, Tensor], words: str
) -> None:
    """Names, shapes and dtypes must agree; the message names the first that doesn't."""
    write_state(tmp_path / "file", {"w": torch.ones(2)})
    with pytest.raises(InvalidInput, match=words):
        load_state_into(other, tmp_path / "file")
    assert all(not tensor.any() for tensor in other.values())


def test_a_dtype_the_format_lacks_is_refused_with_its_name() -> None:
    """Complex numbers can't be sent, and the message says which tensor holds them."""
    with pytest.raises(InvalidInput, match=r"'spectrum' has dtype torch\.complex64"):
        encode_state({"spectrum": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("num_bytes", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_the_digest_is_blake3_of_the_bytes(tmp_path: Path, num_bytes: int) -> None:
    """From memory and from a file read in blocks: BLAKE3-256, in hexadecimal."""
    content = bytes(range(256)) * (num_bytes // 256) + b"x" * (num_bytes % 256)
    (tmp_path / "blob").write_bytes(content)
    expected = blake3(content).hexdigest()
    assert digest_bytes(content) == expected
    assert digest_file(tmp_path / "blob") == expected
    assert len(expected) == 64


def write(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file with this header (as JSON unless it is bytes), right or wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "file"
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def assert_library_agrees(path: Path) -> None:
    """Compare our reading of a file with the safetensors library's, tensor by tensor."""
    layout, content = read_layout(path), path.read_bytes()
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(layout.entries)
        for name, entry in layout.entries.items():
            tensor = opened.get_tensor(name)
            assert tuple(tensor.shape) == entry.shape
            assert tensor.dtype == entry.dtype
            assert bits(tensor) == content[entry.begin : entry.end]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(names, tensors(), max_size=5))
def test_our_layout_is_the_layout_that_the_library_reads(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """Shapes, dtypes and byte ranges of `read_layout` are those of safetensors itself."""
    encoded = encode_state(state)
    path = tmp_path / "file"
    path.write_bytes(encoded)
    assert_library_agrees(path)
    layout = read_layout(path)
    assert layout.size_bytes == len(encoded)
    assert encoded.startswith(layout.header)
    begins = [entry.begin for entry in layout.entries.values()]
    assert begins == sorted(begins)


def test_a_layout_is_read_at_an_offset(tmp_path: Path) -> None:
    """A section in the middle of a file is read as if it were a file of its own."""
    encoded = encode_state({"w": torch.arange(3.0)})
    (tmp_path / "alone").write_bytes(encoded)
    (tmp_path / "inside").write_bytes(b"before" + encoded + b"behind")
    assert read_layout(tmp_path / "inside", offset=6, size_bytes=len(encoded)) == read_layout(
        tmp_path / "alone"
    )


F32 = {"dtype": "F32", "shape": [1]}
BROKEN: dict[str, tuple[object, bytes, str]] = {
    "no JSON": (b"{'a': 1}", b"", "can't be read"),
    "no object": ([], b"", "can't be read"),
    "too deep": (b"[" * 100_000, b"", "can't be read"),
    "UTF-16": (
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.encode("utf-16"),
        b"",
        "can't be read",
    ),
    "half a character as a name": (
        b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "can't be read",
    ),
    "entry is no object": ({"a": 5}, b"", "can't be read"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "shape"),
    "overlap": (
        {"a": F32 | {"data_offsets": [0, 4]}, "b": F32 | {"data_offsets": [2, 6]}},
        b"123456",
        "'b' begins at byte",
    ),
    "same bytes twice": (
        {"a": F32 | {"data_offsets": [0, 4]}, "b": F32 | {"data_offsets": [0, 4]}},
        b"1234",
        "'b' begins at byte",
    ),
    "gap at the start": ({"a": F32 | {"data_offsets": [1, 5]}}, b"12345", "'a' begins at byte"),
    "gap between": (
        {"a": F32 | {"data_offsets": [0, 4]}, "b": F32 | {"data_offsets": [5, 9]}},
        b"123456789",
        "'b' begins at byte",
    ),
    "bytes left over": ({"a": F32 | {"data_offsets": [0, 4]}}, b"12345", "tensors end at byte"),
    "data cut off": ({"a": F32 | {"data_offsets": [0, 4]}}, b"123", "tensors end at byte"),
    "range too long": ({"a": F32 | {"data_offsets": [0, 5]}}, b"12345", "takes 4 bytes"),
    "range backwards": ({"a": F32 | {"data_offsets": [4, 0]}}, b"1234", "takes 4 bytes"),
    "negative": ({"a": F32 | {"data_offsets": [-4, 0]}}, b"", "offsets [-4, 0]"),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 4, 4]}}, b"1234", "offsets [0, 4, 4]"),
    "bool as number": ({"a": F32 | {"data_offsets": [False, 4]}}, b"1234", "offsets [False"),
    "fractions": ({"a": F32 | {"data_offsets": [0.0, 4.0]}}, b"1234", "offsets [0.0"),
    "shape is no list": (
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        b"1234",
        "shape 1",
    ),
    "unknown dtype": (
        {"a": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]}},
        b"12345678",
        "dtype 'C64'",
    ),
    "numbers too long to print": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[%b,%b]}}' % (b"9" * 4300, b"9" * 4300),
        b"",
        "offsets [999",
    ),
    "a thousand dimensions": (
        {"a": {"dtype": "F32", "shape": [2**62] * 1000, "data_offsets": [0, 0]}},
        b"",
        "has shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_where_it_breaks(tmp_path: Path, name: str) -> None:
    """Wrong headers, gaps, overlaps and wrong offsets end in InvalidInput and nothing else."""
    header, data, words = BROKEN[name]
    path = write(tmp_path, header, data)
    with pytest.raises(InvalidInput) as caught:
        read_layout(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("length", [3, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_never_read(
    tmp_path: Path, length: int
) -> None:
    """The claimed length is examined before memory is taken for it."""
    path = write(tmp_path, b"{}", length=length)
    with pytest.raises(InvalidInput):
        read_layout(path)
    with pytest.raises(InvalidInput):
        decode_state(path.read_bytes())


STATE = {
    "norm.num_batches_tracked": torch.tensor(3),
    "w": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.float16),
    "none": torch.empty(0),
    "mask": torch.tensor([True, False]),
}


def assert_refused_or_read_alike(path: Path) -> None:
    """Whatever our reader takes the library takes too, and reads the same; else InvalidInput."""
    try:
        read_layout(path)
    except InvalidInput:
        with contextlib.suppress(InvalidInput):
            decode_state(path.read_bytes())
    else:
        assert_library_agrees(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_no_flipped_byte_raises_anything_but_invalid_input(
    tmp_path: Path, data: st.DataObject
) -> None:
    """One byte changed anywhere: refused by name, or another file that both readers read alike."""
    content = bytearray(encode_state(STATE))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "file"
    path.write_bytes(content)
    assert_refused_or_read_alike(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncated_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """A file that ends early is InvalidInput, wherever it ends."""
    content = encode_state(STATE)
    path = tmp_path / "file"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InvalidInput):
        read_layout(path)
    with pytest.raises(InvalidInput):
        decode_state(path.read_bytes())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(content=st.binary(max_size=200), header=st.binary(max_size=200))
@example(content=b"", header=b"")
@example(content=b"\0" * 8, header=b"null")
def test_random_bytes_raise_nothing_but_invalid_input(
    tmp_path: Path, content: bytes, header: bytes
) -> None:
    """Garbage as a whole, and garbage behind a right header length, are refused by name."""
    path = tmp_path / "file"
    for whole in (content, struct.pack("<Q", len(header)) + header + content):
        path.write_bytes(whole)
        assert_refused_or_read_alike(path)

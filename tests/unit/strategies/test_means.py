"""The weighted mean: its values against exact fractions, its rules for each kind of entry."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrounds.errors import NotFound, StorageDamaged
from fedrounds.strategies import blocks
from fedrounds.strategies.blocks import Cohort, blocks_of
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import decode_state, digest_bytes, encode_state
from fedrounds.tensors.entries import entry_kinds
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints, GlobalModel, NonFiniteAggregate
from tests.factories import State, TinyNet, write_state
from tests.unit.shared.test_rounding import PRECISIONS, nearest

KINDS = entry_kinds(TinyNet())
AVERAGED = (EntryKind.PARAMETER, EntryKind.MEAN)
ONE_PARAMETER = {"w": EntryKind.PARAMETER}
FEDAVG = find_strategy("fedavg")


def aggregate(
    folder: Path,
    base: State,
    updates: Sequence[tuple[State, int]],
    *,
    kinds: Mapping[str, EntryKind] = KINDS,
) -> GlobalModel:
    """Write the files, aggregate them, keep the result."""
    start = write_state(folder, base)
    files = [write_state(folder, state, num_examples=weight) for state, weight in updates]
    checkpoints = Checkpoints(folder / "models", kinds)
    cohort = Cohort(base=start, updates=files, kinds=kinds)
    return checkpoints.save(start, next_blocks(FEDAVG, cohort))


def result_of(model: GlobalModel) -> dict[str, Tensor]:
    """Read an aggregate back, and hold that its digest is its content's."""
    content = model.file.path.read_bytes()
    assert digest_bytes(content) == model.digest
    return decode_state(content)


def exact_mean(tensors: Sequence[Tensor], weights: Sequence[int]) -> list[Fraction]:
    """Return sum(weight * value) / sum(weight) without any rounding."""
    columns = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    return [
        sum((weight * Fraction(value) for weight, value in zip(weights, column, strict=True)))
        / Fraction(sum(weights))
        for column in columns
    ]


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """Return the number of `dtype` that is nearest to a fraction, without another on the way."""
    if dtype in PRECISIONS:
        return nearest(value, dtype)
    # Python's own division rounds a fraction once to float64; torch's cast to float32 once more,
    # which would need a fraction within 2^-54 of a middle to go wrong.
    return float(torch.tensor(float(value), dtype=torch.float64).to(dtype))


def random_state(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a client might send: every float drawn anew, counters advanced."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        if KINDS[name] in AVERAGED
        else tensor + seed
        if KINDS[name] is EntryKind.MAX
        else tensor
        for name, tensor in TinyNet(dtype).state_dict().items()
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_every_averaged_value_is_the_exact_mean_rounded_once(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Parameters and float buffers: the fraction, rounded to the dtype; float64 to 4 ulps.

    float64 rounds at each of its 3 products, 3 sums and 1 division, so it may differ by some ulps.
    """
    weights = [600, 1, 299]
    states = [random_state(seed, dtype) for seed in (1, 2, 3)]
    base = TinyNet(dtype).state_dict()
    result = result_of(aggregate(tmp_path, base, list(zip(states, weights, strict=True))))
    for name, kind in KINDS.items():
        if kind not in AVERAGED:
            continue
        assert result[name].dtype == dtype
        expected = exact_mean([state[name] for state in states], weights)
        for got, fraction in zip(result[name].flatten().tolist(), expected, strict=True):
            if dtype is torch.float64:
                scale = max(abs(float(state[name].abs().max())) for state in states)
                assert abs(Fraction(got) - fraction) <= 4 * math.ulp(scale)
            else:
                assert got == rounded(fraction, dtype), name


def test_counters_take_the_maximum_and_fixed_entries_the_base(tmp_path: Path) -> None:
    """num_batches_tracked never falls behind the base; integers and bools stay as they were."""
    base = TinyNet().state_dict() | {"norm.num_batches_tracked": torch.tensor(5)}
    other = {"steps": torch.zeros(4, dtype=torch.int32), "mask": torch.zeros(3, dtype=torch.bool)}
    counted = [
        base | other | {"norm.num_batches_tracked": torch.tensor(value)} for value in (9, 11, 7)
    ]
    result = result_of(aggregate(tmp_path, base, [(state, 1) for state in counted]))
    assert result["norm.num_batches_tracked"].item() == 11
    assert result["steps"].tolist() == [0, 1, 2, 3]
    assert result["mask"].tolist() == [True, False, True]
    behind = base | {"norm.num_batches_tracked": torch.tensor(2)}
    result = result_of(aggregate(tmp_path, base, [(behind, 1)]))
    assert result["norm.num_batches_tracked"].item() == 5


def test_without_weight_the_next_model_is_the_base(tmp_path: Path) -> None:
    """No updates, or none with a weight: the base's bytes, and never 0/0."""
    base = random_state(1, torch.float32)
    for updates in ([], [(random_state(2, torch.float32), 0)] * 2):
        model = aggregate(tmp_path, base, updates)
        assert model.file.path.read_bytes() == encode_state(base)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    weight=st.integers(1, 2**29 - 1),
    copies=st.integers(1, 3),
)
def test_equal_updates_are_their_own_mean_to_the_last_bit(
    tmp_path: Path, values: list[float], weight: int, copies: int
) -> None:
    """One client's bytes are the next model's, subnormals and minus zero too; so for many alike."""
    sent = {"w": torch.tensor(values)}
    base = {"w": torch.zeros(len(values))}
    model = aggregate(tmp_path, base, [(sent, weight)] * copies, kinds=ONE_PARAMETER)
    assert model.file.path.read_bytes() == encode_state(sent)


def test_a_weight_of_zero_beside_others_counts_for_nothing(tmp_path: Path) -> None:
    """Only num_examples decides: a client with none leaves the mean as it is."""
    first, second = random_state(1, torch.float32), random_state(2, torch.float32)
    base = TinyNet().state_dict()
    model = aggregate(tmp_path, base, [(first, 0), (second, 3)])
    result = result_of(model)
    assert all(
        torch.equal(result[name], second[name]) for name, kind in KINDS.items() if kind in AVERAGED
    )


def test_the_parameter_norm_counts_parameters_alone(tmp_path: Path) -> None:
    """L2 over parameters, to float32's precision; nothing else is counted."""
    state = random_state(4, torch.float32)
    model = aggregate(tmp_path, state, [(state, 1)])
    squares = sum(
        float(value) ** 2
        for name, kind in KINDS.items()
        if kind is EntryKind.PARAMETER
        for value in state[name].flatten().tolist()
    )
    assert model.parameter_norm == pytest.approx(math.sqrt(squares), rel=1e-6)
    loaded = Checkpoints(tmp_path / "models", KINDS).load(model.digest)
    assert loaded.parameter_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_aggregate_that_is_not_finite_is_dropped(tmp_path: Path, bad: float) -> None:
    """A NaN or infinity in a parameter raises with the entry's name; no file is kept."""
    sent = random_state(1, torch.float32)
    sent["fc.weight"] = sent["fc.weight"].clone()
    sent["fc.weight"].view(-1)[2] = bad
    with pytest.raises(NonFiniteAggregate, match=r"'fc\.weight'"):
        aggregate(tmp_path, random_state(2, torch.float32), [(sent, 1)])
    assert list((tmp_path / "models").iterdir()) == []


def test_a_mean_beyond_float64_is_dropped_too(tmp_path: Path) -> None:
    """Finite float64 updates whose weighted sum overflows never become a model."""
    huge = {"w": torch.full((2,), 1e308, dtype=torch.float64)}
    with pytest.raises(NonFiniteAggregate):
        aggregate(tmp_path, huge, [(huge, 1000)], kinds=ONE_PARAMETER)
    assert list((tmp_path / "models").iterdir()) == []


def test_blocks_cover_every_element_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, blocks make the same bytes; empty entries have none."""
    state = {"a": torch.arange(10.0), "b": torch.tensor(2.0), "none": torch.empty(0, 3)}
    kinds = dict.fromkeys(state, EntryKind.PARAMETER)
    whole = aggregate(tmp_path, state, [(state, 3)], kinds=kinds)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 3)
    cut = list(blocks_of(whole.file.layout))
    assert [(block.name, block.begin, block.count) for block in cut if block.name == "a"] == [
        ("a", 0, 3),
        ("a", 3, 3),
        ("a", 6, 3),
        ("a", 9, 1),
    ]
    assert [block.count for block in cut if block.name != "a"] == [1]
    again = aggregate(tmp_path, state, [(state, 3)], kinds=kinds)
    assert again.digest == whole.digest == digest_bytes(encode_state(state))


def test_a_file_that_shrank_or_went_is_damage(tmp_path: Path) -> None:
    """An update cut short behind the server's back stops the aggregation, with the file's name."""
    base = write_state(tmp_path, {"w": torch.zeros(4)})
    cut = write_state(tmp_path, {"w": torch.ones(4)}, num_examples=1)
    cut.path.write_bytes(cut.path.read_bytes()[:-1])
    cohort = Cohort(base=base, updates=[cut], kinds=ONE_PARAMETER)
    with pytest.raises(StorageDamaged, match="ends inside tensor 'w'"):
        list(next_blocks(FEDAVG, cohort))
    cut.path.unlink()
    with pytest.raises(StorageDamaged, match="is gone"):
        list(next_blocks(FEDAVG, cohort))


def test_a_model_on_disk_is_examined_before_it_is_used(tmp_path: Path) -> None:
    """A flipped bit is StorageDamaged and the file stays; a model never written is NotFound."""
    checkpoints = Checkpoints(tmp_path, KINDS)
    state = random_state(1, torch.float32)
    saved = checkpoints.save_initial(state)
    assert saved.file.path.read_bytes() == encode_state(state)
    assert [path.name for path in tmp_path.iterdir()] == [f"{saved.digest}.safetensors"]
    content = bytearray(saved.file.path.read_bytes())
    content[-1] ^= 1
    saved.file.path.write_bytes(content)
    with pytest.raises(StorageDamaged, match="other bytes than its name says"):
        checkpoints.load(saved.digest)
    assert saved.file.path.read_bytes() == content
    with pytest.raises(NotFound, match="no model"):
        checkpoints.load("00" * 32)

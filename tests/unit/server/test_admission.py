"""What makes an update good: each refusal with its sentence."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fedrounds.strategies import StrategySettings
from fedrounds.strategies.blocks import BLOCK_ELEMENTS, StateFile
from fedrounds.strategies.registry import find_strategy
from fedrounds.tensors.codec import decode_state, digest_bytes
from fedrounds.tensors.entries import entry_kinds
from fedrounds.types import (
    CONTROL_SECTION,
    MAX_WEIGHT,
    MODEL_SECTION,
    ClientUpdate,
    EntryKind,
    Section,
)
from fedserver.settings import ServerSettings
from fedserver.updates.admission import (
    UpdateRefused,
    validate_content,
    validate_control,
    validate_header,
    validate_section_digests,
)
from tests.factories import State, TinyNet, make_limits, make_update, write_state

KINDS = entry_kinds(TinyNet())


@pytest.fixture
def base(tmp_path: Path) -> StateFile:
    """Give the global model a round began from."""
    return write_state(tmp_path, TinyNet().state_dict() | {"head.weight": torch.zeros(3, 3)})


def header(base: StateFile, **changed: object) -> ClientUpdate:
    """Return a good header for this model, but for what is changed."""
    values: dict[str, object] = {"size_bytes": base.layout.size_bytes}
    fields = {name: changed.pop(name) for name in ("measurements",) if name in changed}
    update = make_update(**values | changed)  # type: ignore[arg-type]
    return replace(update, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_examples": 1, "num_steps": 2},
        {"num_examples": 1000, "num_steps": 2000},
        {"num_steps": 0},
        {"metrics": {}},
        {"metrics": {"accuracy": 0, "loss": -1.0, "train_s": 1e9}},
    ],
    ids=str,
)
def test_a_possible_header_is_admitted(base: StateFile, changed: dict[str, object]) -> None:
    """The bounds themselves are inside."""
    validate_header(header(base, **changed), base, make_limits())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_examples": 0}, r"num_examples is 0; it must lie in 1 to 1000"),
        ({"num_examples": -5}, r"num_examples is -5; it must lie in 1 to 1000"),
        ({"num_examples": 1001}, r"num_examples is 1001; it must lie in 1 to 1000"),
        ({"num_examples": 2**62}, "num_examples is"),
        ({"num_steps": -1}, r"num_steps is -1; it must lie in 0 to 20"),
        ({"num_steps": 21}, r"num_steps is 21; it must lie in 0 to 20"),
        (
            {"metrics": {"path": 1.0}},
            r"metric 'path' is 1\.0; metrics are .*accuracy, .*loss, .*train_s",
        ),
        ({"metrics": {"loss": math.nan}}, "metric 'loss' is nan; metrics are numbers"),
        ({"metrics": {"loss": math.inf}}, "metric 'loss' is inf"),
        ({"metrics": {"global_loss": -1.7e308}}, "metric 'global_loss' is .*; .* at most 1e.30"),
        (
            {"metrics": {"global_accuracy": 1.5}},
            r"'global_accuracy' is 1\.5; a share of right answers lies in 0 to 1",
        ),
        (
            {"metrics": {"global_examples": 0.0}},
            "'global_examples' is 0; it must lie in 1 to 1000",
        ),
        (
            {"measurements": {"f1/tp": (1.0, math.nan)}},
            "the measurements 'f1/tp' hold a value that",
        ),
        (
            {"measurements": {"f1/tp": (-1e31,)}},
            r"isn't a number of at most 1e\+30 either side of 0",
        ),
        ({"size_bytes": 0}, "the payload has 0 bytes"),
        ({"size_bytes": 10**12}, r"the payload has 1000000000000 bytes; the model has \d+"),
        ({"section": "residual"}, r"has sections \['residual'\] of .* hold 'model' alone"),
    ],
    ids=str,
)
def test_an_impossible_header_is_refused(
    base: StateFile, changed: dict[str, object], words: str
) -> None:
    """Weight, steps, metrics, size and sections: the sentence has the value and the bound."""
    with pytest.raises(UpdateRefused, match=words):
        validate_header(header(base, **changed), base, make_limits())


@pytest.mark.parametrize(
    ("strategy", "changed", "words"),
    [
        ("qfedavg", {}, "qfedavg needs each client's loss of the global model.*came with None"),
        ("qfedavg", {"metrics": {"global_loss": -0.5}}, "not below 0; .* came with -0.5"),
        ("qfedavg", {"metrics": {"global_loss": 1e20}}, r"no weight for a loss .* of 1e\+20"),
        ("fednova", {"num_steps": 0}, "fednova divides by the local steps, .* has 0"),
    ],
)
def test_a_header_that_the_strategy_cant_weigh_is_refused(
    base: StateFile, strategy: str, changed: dict[str, object], words: str
) -> None:
    """It is its sender's fault, before the round closes; any other strategy takes it."""
    chosen = find_strategy(
        strategy,
        {"q": 20} if strategy == "qfedavg" else {},
        settings=StrategySettings(lr=0.05, evaluate_on_clients=True),
    )
    limits = make_limits(unmet=chosen.unmet)
    with pytest.raises(UpdateRefused, match=words):
        validate_header(header(base, **changed), base, limits)
    validate_header(header(base, metrics={"global_loss": 0.0}), base, limits)
    validate_header(header(base, **changed), base, make_limits())


def test_sections_must_cover_the_payload(base: StateFile) -> None:
    """No section, two sections, or one of another size than the payload: refused."""
    good = header(base)
    section = good.sections[0]
    short = Section(name=MODEL_SECTION, digest=section.digest, size_bytes=section.size_bytes - 1)
    for sections in ((), (section, section), (short,)):
        update = ClientUpdate(**vars(good) | {"sections": sections})
        with pytest.raises(UpdateRefused, match="it must hold 'model' alone, of the same size"):
            validate_header(update, base, make_limits())


def test_no_setting_admits_a_weight_that_breaks_exactness() -> None:
    """num_examples * float32 is exact in float64 up to 29 + 24 = 53 bits: 2^29 is too much."""
    assert MAX_WEIGHT == 2**29 - 1
    assert ServerSettings(max_num_examples=MAX_WEIGHT).max_num_examples == MAX_WEIGHT
    with pytest.raises(ValidationError, match="less than 536870912"):
        ServerSettings(max_num_examples=MAX_WEIGHT + 1)


def examine(folder: Path, base: StateFile, state: State, *, cap: float = 10.0) -> None:
    """Examine what a client sent."""
    validate_content(
        write_state(folder, state),
        base=base,
        kinds=KINDS,
        limits=make_limits(max_delta_norm=cap),
    )


def state_of(base: StateFile) -> dict[str, Tensor]:
    """Return the model's own state, to be changed."""
    return decode_state(base.path.read_bytes())


def test_the_model_itself_and_a_trained_model_are_admitted(tmp_path: Path, base: StateFile) -> None:
    """No change is fine; so are changed parameters, and buffers whatever they hold."""
    state = state_of(base)
    examine(tmp_path, base, state)
    state["fc.weight"] = state["fc.weight"] + 1
    for values in ([1e30, 1e30, 1e30], [1.0, -0.5, 1.0], [1.0, math.nan, math.inf]):
        state["norm.running_var"] = torch.tensor(values)
        examine(tmp_path, base, state)
    for counter in (4, -1, 2**63 - 1):
        state["norm.num_batches_tracked"] = torch.tensor(counter)
        examine(tmp_path, base, state)
    state["steps"] = torch.zeros(4, dtype=torch.int32)
    state["mask"] = torch.tensor([True, True, True])
    examine(tmp_path, base, state)


def swapped(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    """Return a change that puts another tensor under this name."""
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("fc.bias"), r"tensors are missing: 'fc\.bias'"),
        (swapped("secret", torch.ones(1)), "the model has no tensors named 'secret'"),
        (
            swapped("fc.bias", torch.zeros(4)),
            r"'fc\.bias' has shape \[4\] and dtype torch\.float32; the model has \[3\]",
        ),
        (swapped("fc.weight", torch.zeros(9)), r"'fc\.weight' has shape \[9\]"),
        (
            swapped("fc.bias", torch.zeros(3, dtype=torch.float64)),
            r"'fc\.bias' has shape \[3\] and dtype torch\.float64",
        ),
        (swapped("steps", torch.arange(4)), r"'steps' has shape \[4\] and dtype torch\.int64"),
        (
            swapped("fc.bias", torch.tensor([0.0, math.nan, math.nan])),
            r"'fc\.bias' holds nan at element 1 \(2 non-finite values\)",
        ),
        (swapped("fc.bias", torch.full((3,), -math.inf)), "holds -inf at element 0"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(
    tmp_path: Path,
    base: StateFile,
    change: Callable[[dict[str, Tensor]], object],
    words: str,
) -> None:
    """Keys, shapes, dtypes, finiteness: which one, where and why."""
    state = state_of(base)
    change(state)
    with pytest.raises(UpdateRefused, match=words):
        examine(tmp_path, base, state)


def test_the_norm_cap_is_on_the_delta_of_all_parameters(tmp_path: Path, base: StateFile) -> None:
    """L2 of local minus global: (3, 4, 0) in the bias and 12 in the weight make 13.

    What is exactly at the cap is admitted, and a change of buffers costs nothing.
    """
    state = state_of(base)
    state["head.weight"] = torch.zeros(3, 3)
    state["head.weight"][1, 1] = 12.0
    state["norm.bias"] = state["norm.bias"] + torch.tensor([3.0, 4.0, 0.0])
    state["norm.running_mean"] = torch.full((3,), 1e6)
    examine(tmp_path, base, state, cap=13.0)
    with pytest.raises(UpdateRefused, match=r"13 away from the global model .*cap is 12\.999"):
        examine(tmp_path, base, state, cap=12.999)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_any_precision_is_that_of_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    """Over several blocks, the cap lies between 0.1 % below and above the independent norm."""
    kinds = {"w": EntryKind.PARAMETER}
    generator = torch.Generator().manual_seed(3)
    size = 2 * BLOCK_ELEMENTS + 5
    start, sent = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    norm = float((sent.double() - start.double()).norm())
    base, received = (write_state(tmp_path, {"w": values}) for values in (start, sent))
    for cap, is_good in ((norm * 1.001, True), (norm * 0.999, False)):
        limits = make_limits(max_delta_norm=cap)
        if is_good:
            validate_content(received, base=base, kinds=kinds, limits=limits)
        else:
            with pytest.raises(UpdateRefused, match="away from the global model"):
                validate_content(received, base=base, kinds=kinds, limits=limits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_many_is_found_with_its_index(
    tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    """In the second block, in any precision; the index counts from the tensor's first element."""
    state = {"w": torch.zeros(BLOCK_ELEMENTS + 10, dtype=dtype)}
    base = write_state(tmp_path, state)
    index = BLOCK_ELEMENTS + 7
    state["w"][index] = bad
    received = write_state(tmp_path, state)
    with pytest.raises(UpdateRefused, match=f"'w' holds {bad} at element {index} "):
        validate_content(
            received, base=base, kinds={"w": EntryKind.PARAMETER}, limits=make_limits()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_delta_whose_square_overflows_is_beyond_every_cap(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Finite but absurd: refused for its norm, not taken for a NaN; in a buffer it may stand."""
    largest = torch.finfo(dtype).max
    base = write_state(tmp_path, {"w": torch.zeros(2, dtype=dtype)})
    received = write_state(tmp_path, {"w": torch.full((2,), largest, dtype=dtype)})

    def examine_as(kind: EntryKind) -> None:
        validate_content(
            received,
            base=base,
            kinds={"w": kind},
            limits=make_limits(max_delta_norm=1e9),
        )

    with pytest.raises(UpdateRefused, match="away from the global model"):
        examine_as(EntryKind.PARAMETER)
    examine_as(EntryKind.MEAN)


def test_a_number_of_examples_that_cant_be_is_refused(base: StateFile) -> None:
    """The examples that the global model was measured on: 1 to the weight's cap."""
    limits = make_limits(max_num_examples=1000)
    for possible in (1, 1000):
        validate_header(header(base, metrics={"global_examples": possible}), base, limits)
    for impossible in (0, 1001):
        with pytest.raises(UpdateRefused, match="it must lie in 1 to 1000") as refused:
            validate_header(header(base, metrics={"global_examples": impossible}), base, limits)
        assert refused.value.refusal.evidence == {"kind": "metrics"}


def test_a_sections_digest_must_be_that_of_its_bytes(tmp_path: Path) -> None:
    """Two sections, one after another; a header may leave a digest out, but not make one up."""
    path = tmp_path / "update"
    path.write_bytes(b"modelcontrol")
    digests = {MODEL_SECTION: digest_bytes(b"model"), CONTROL_SECTION: digest_bytes(b"control")}
    for changed in (None, MODEL_SECTION, CONTROL_SECTION):
        given = digests | ({} if changed is None else {changed: "00" * 32})
        for left_out in ((), (MODEL_SECTION,), (CONTROL_SECTION,)):
            sections = tuple(
                Section(
                    name=name,
                    digest="" if name in left_out else given[name],
                    size_bytes=len(content),
                )
                for name, content in ((MODEL_SECTION, b"model"), (CONTROL_SECTION, b"control"))
            )
            update = replace(make_update(payload=b"modelcontrol"), sections=sections)
            if changed is None or changed in left_out:
                validate_section_digests(path, update)
            else:
                with pytest.raises(UpdateRefused, match=f"section '{changed}' has") as refused:
                    validate_section_digests(path, update)
                assert refused.value.refusal.evidence["section"] == changed


def test_a_single_sections_digest_is_the_payloads(tmp_path: Path) -> None:
    """The file isn't read again: here there is none."""
    update = make_update(payload=b"model")
    validate_section_digests(tmp_path / "absent", update)
    section = replace(update.sections[0], digest="00" * 32)
    with pytest.raises(UpdateRefused, match="but the header says 0000"):
        validate_section_digests(tmp_path / "absent", replace(update, sections=(section,)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([3.0, 4.0], None),
        ([3.0, 4.1], "cap"),
        ([math.nan, 0.0], "'w' holds nan"),
        ([math.inf, 0.0], "'w' holds inf"),
        ([1.0, 2.0, 3.0], "w"),
    ],
)
def test_control_variates_are_examined_like_a_delta(
    tmp_path: Path, values: list[float], words: str | None
) -> None:
    """|(3, 4)| = 5 is the cap; other entries or values that aren't finite are refused too."""
    expected = write_state(tmp_path, {"w": torch.zeros(2)})
    received = write_state(tmp_path, {"w": torch.tensor(values)})
    limits = replace(make_limits(), max_control_norm=5.0)
    if words is None:
        validate_control(received, expected=expected.layout, limits=limits)
        return
    with pytest.raises(UpdateRefused, match=words):
        validate_control(received, expected=expected.layout, limits=limits)

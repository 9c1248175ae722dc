"""Payloads of several sections: written, read where they lie, refused where they don't fit."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedrounds.errors import InvalidInput
from fedrounds.strategies.blocks import Block, BlockReader
from fedrounds.tensors.codec import digest_file, read_layout
from fedrounds.tensors.payloads import read_payload, write_payload
from fedrounds.types import NO_COMPRESSION, EntryKind
from fedserver.updates.admission import UpdateRefused, validate_control, validate_header
from fedserver.updates.payload import update_file
from tests.factories import make_limits, make_update, write_state

MODEL = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
CONTROL = {"w": torch.full((2, 3), 7.0), "b": torch.tensor([8.0, 9.0])}


def test_each_section_is_read_where_it_lies(tmp_path: Path) -> None:
    """Also when the file holds one section alone, whose digest is the payload's."""
    path = tmp_path / "payload"
    (alone,) = write_payload(path, {"model": MODEL})
    assert alone.digest == digest_file(path)
    written = write_payload(path, {"model": MODEL, "control": CONTROL})
    assert written[0] == alone
    assert list(tmp_path.iterdir()) == [path]
    sections = [(section.name, section.size_bytes) for section in written]
    file = update_file(
        path,
        base=write_state(tmp_path, MODEL),
        kinds=dict.fromkeys(MODEL, EntryKind.PARAMETER),
        compression=NO_COMPRESSION,
        sections=sections,
        num_examples=3,
    )
    reader = BlockReader()
    assert reader.read(file, Block("w", 1, 3)).tolist() == [1, 2, 3]
    assert reader.read(file.others["control"], Block("b", 0, 2)).tolist() == [8, 9]
    with pytest.raises(InvalidInput, match="its sections have"):
        read_payload(path, sections[:1])
    with pytest.raises(InvalidInput, match="its tensors end at byte"):
        read_payload(path, [("model", sections[0][1] - 8), ("control", sections[1][1] + 8)])


def test_sections_that_weren_t_asked_for_are_refused(tmp_path: Path) -> None:
    base = write_state(tmp_path, MODEL)
    sections = write_payload(tmp_path / "payload", {"model": MODEL, "control": CONTROL})
    update = replace(
        make_update(size_bytes=sum(section.size_bytes for section in sections)), sections=sections
    )
    both = replace(make_limits(), sections=("model", "control"))
    validate_header(update, base, both)
    with pytest.raises(UpdateRefused, match="it must hold 'model' alone"):
        validate_header(update, base, make_limits())
    with pytest.raises(UpdateRefused, match="'model' and 'control' alone"):
        validate_header(replace(update, sections=sections[:1]), base, both)
    with pytest.raises(UpdateRefused, match="of the same size"):
        validate_header(replace(update, size_bytes=update.size_bytes + 1), base, both)


def test_a_header_far_longer_than_the_models_is_never_parsed(tmp_path: Path) -> None:
    """What is admitted has the model's names, so a megabyte of others needs no look at each."""
    base = write_state(tmp_path, {"w": torch.zeros(2)})
    own = base.path.read_bytes()[len(base.layout.header) :]

    def examine(*, num_spaces: int) -> None:
        text = base.layout.header[8:] + b" " * num_spaces
        path = tmp_path / "update"
        path.write_bytes(len(text).to_bytes(8, "little") + text + own)
        update_file(
            path,
            base=base,
            kinds={"w": EntryKind.PARAMETER},
            compression=NO_COMPRESSION,
            sections=[("model", path.stat().st_size)],
            num_examples=1,
        )

    examine(num_spaces=1 << 20)
    with pytest.raises(
        InvalidInput, match=r"its header claims \d+ bytes, at most \d+ are possible"
    ):
        examine(num_spaces=2 << 20)


@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "tensor 'w' holds nan at element 4"), (1e3, "the round's cap is 100")],
)
def test_control_variates_are_finite_and_not_absurd(
    tmp_path: Path, value: float, words: str
) -> None:
    expected = read_layout(write_state(tmp_path, CONTROL).path)
    limits = replace(make_limits(), max_control_norm=100.0)
    validate_control(write_state(tmp_path, CONTROL), expected=expected, limits=limits)
    bad = {name: tensor.clone() for name, tensor in CONTROL.items()}
    bad["w"][1, 1] = value
    with pytest.raises(UpdateRefused, match=words):
        validate_control(write_state(tmp_path, bad), expected=expected, limits=limits)
    with pytest.raises(UpdateRefused, match="tensors are missing: 'b'"):
        validate_control(
            write_state(tmp_path, {"w": CONTROL["w"]}), expected=expected, limits=limits
        )

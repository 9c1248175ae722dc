"""Text files become windows in which nothing is lost, numbered alike by everybody."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fedrounds.data.texts import CHARACTERS, NUM_CHARACTERS, WINDOW, encode_text, load_windows
from fedrounds.errors import DataUnavailable, InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Partition


def write(root: Path, **texts: str) -> Path:
    """Write text files, each by its name, and return their folder."""
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def test_the_classes_are_pinned() -> None:
    """Clients of different versions must agree: other, line end, then ASCII 32 to 126."""
    assert NUM_CHARACTERS == 97
    assert CHARACTERS[0] == "\n"
    assert encode_text("\n !~").tolist() == [1, 2, 3, 96]


@given(st.text())
def test_every_character_has_a_class_and_ascii_characters_their_own(text: str) -> None:
    classes = encode_text(text)
    assert classes.dtype == np.int64
    expected = [CHARACTERS.find(character) + 1 for character in text]
    assert classes.tolist() == expected


@given(length=st.integers(WINDOW + 1, 5 * WINDOW), seed=st.integers(0, 99))
def test_windows_cover_every_character_once_or_at_the_end_twice(
    tmp_path_factory: pytest.TempPathFactory, length: int, seed: int
) -> None:
    """Written to the places the rule gives, the windows are the text; only the last overlaps."""
    codes = np.random.default_rng(seed).integers(32, 127, length)
    text = "".join(chr(code) for code in codes)
    windows, files = load_windows(write(tmp_path_factory.mktemp("texts"), a=text))
    assert windows.shape[1] == WINDOW + 1
    assert files.tolist() == [0] * len(windows)
    # The targets of n windows are n * WINDOW characters of all but the first.
    assert len(windows) == -(-(length - 1) // WINDOW)
    rebuilt = np.zeros(length, np.int64)
    for index, window in enumerate(windows):
        start = min(index * WINDOW, length - WINDOW - 1)
        rebuilt[start : start + WINDOW + 1] = window
    assert rebuilt.tolist() == encode_text(text).tolist()


def test_targets_are_the_inputs_shifted_by_one_character(tmp_path: Path) -> None:
    task = find_task("text")
    root = write(tmp_path, a="abcdefghij" * 20)
    examples = task.load_train(DataRequest(data_root=root))
    assert isinstance(examples, TensorDataset)
    inputs, targets = examples.tensors
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert inputs.shape == targets.shape == (4, WINDOW)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_files_below_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    """And line ends are one character, whoever wrote the file."""
    write(tmp_path / "b", two="b" * 70)
    write(tmp_path, c="c" * 70)
    (tmp_path / "a.txt").write_bytes(b"a\r\n" * 40)
    (tmp_path / "notes.md").write_text("x" * 100)
    windows, files = load_windows(tmp_path)
    assert files.tolist() == [0, 0, 1, 1, 2, 2]
    a, newline = encode_text("a\n").tolist()
    assert windows[0, :4].tolist() == [a, newline, a, newline]
    assert {CHARACTERS[value - 1] for value in windows[2:].flatten()} == {"b", "c"}


def test_a_partition_by_classes_deals_out_whole_files(tmp_path: Path) -> None:
    """Four files of four letters, four clients of one class each: everybody has one letter."""
    root = write(tmp_path, **{name: name * 200 for name in "abcd"})
    letters = set()
    for index in range(4):
        partition = Partition(
            scheme="classes",
            num_partitions=4,
            index=index,
            seed=0,
            parameters={"classes_per_client": 1},
        )
        examples = find_task("text").load_train(DataRequest(data_root=root, partition=partition))
        assert isinstance(examples, TensorDataset)
        (letter,) = set(examples.tensors[0].flatten().tolist())
        letters.add(CHARACTERS[letter - 1])
    assert letters == set("abcd")


def test_a_folder_named_like_a_text_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "old.txt").mkdir()
    windows, _ = load_windows(write(tmp_path, text="a" * 65))
    assert len(windows) == 1


def test_what_cant_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataUnavailable, match=r"no .txt file of 65 characters .*--data-root"):
        load_windows(write(tmp_path))
    with caplog.at_level(logging.WARNING), pytest.raises(DataUnavailable):
        load_windows(write(tmp_path, short="too short"))
    assert "short.txt is left out: it has 9 characters, and 65 are needed" in caplog.text
    (tmp_path / "bad.txt").write_bytes(b"abc\xff" * 100)
    with pytest.raises(InvalidInput, match=r"bad.txt is not UTF-8: byte 3 is 0xff"):
        load_windows(tmp_path)
    with pytest.raises(InvalidInput, match="task 'text' needs --data-root"):
        find_task("text").load_train(DataRequest())
    assert find_task("text").load_test(None) is None

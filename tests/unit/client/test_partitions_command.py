"""`python -m fedclient partitions`: what it counts is what the clients would hold."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedclient.commands import partitions
from fedclient.settings import PartitionsSettings
from fedrounds.cli import parse
from fedrounds.errors import InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Partition, Task

WINDOW = 65
"""Characters of a text that one window takes up, the character to be predicted included."""


class Pairs(Dataset[tuple[torch.Tensor, ...]]):
    """A data set that is no TensorDataset, with plain numbers as targets."""

    def __init__(self, labels: list[int]) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return torch.zeros(2), self._labels[index]


def _own(load_train: object) -> Task:
    return Task(
        name="own",
        build_model=lambda: nn.Linear(2, 2),
        load_train=load_train,  # type: ignore[arg-type]
        load_test=lambda _: None,
        loss=nn.functional.cross_entropy,
    )


dealt = _own(lambda request: Pairs([request.partition.index] * (2 + request.partition.index)))
measured = _own(lambda _: TensorDataset(torch.zeros(3, 2), torch.rand(3)))
nothing = _own(lambda _: Pairs([]))


def run(*argv: str) -> None:
    """Run the command with these flags."""
    assert partitions.run(parse(PartitionsSettings, list(argv))) == 0


def _counted(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[int]]:
    """Return the numbers of each row that is printed: client, examples, labels that are there."""
    run(*argv)
    rows = re.findall(r"^ +(\d+(?: +\d+)*) *$", capsys.readouterr().out, re.MULTILINE)
    return [[int(number) for number in row.split()] for row in rows]


def test_the_counts_are_those_of_the_shares_that_clients_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The same seed, scheme and parameter as a run's, beside what a client of it trains on."""
    picture = tmp_path / "split.png"
    argv = ["--partition", "dirichlet", "--alpha", "0.3", "--num-partitions", "4", "--seed", "5"]
    counted = _counted(capsys, *argv, "--out", str(picture))
    partition = Partition(
        scheme="dirichlet", num_partitions=4, index=2, seed=5, parameters={"alpha": 0.3}
    )
    examples = find_task("mnist-sample").load_train(DataRequest(partition=partition))
    assert isinstance(examples, TensorDataset)
    labels = np.bincount(examples.tensors[1].numpy())
    assert counted[2] == [2, len(examples), *labels[labels > 0].tolist()]
    assert [row[1] for row in counted] == [2500] * 4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_texts_are_counted_by_their_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Three authors, one for each client; their windows are theirs alone."""
    for number in range(3):
        (tmp_path / f"author{number}.txt").write_text("x" * (WINDOW + 64 * number))
    argv = ("--task", "text", "--data-root", str(tmp_path), "--num-partitions", "3")
    counted = _counted(capsys, *argv, "--partition", "classes", "--classes-per-client", "1")
    assert sorted(row[1:] for row in counted) == [[1, 1], [2, 2], [3, 3]]


def test_tables_are_counted_by_their_classes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two classes, sorted and cut into one shard a client."""
    rows = ["1.5,ham"] * 6 + ["2.5,spam"] * 6
    (tmp_path / "mails.csv").write_text("\n".join(["size,kind", *rows]) + "\n")
    task = "tabular,label=kind,features=size,classes=ham+spam"
    argv = ("--task", task, "--data-root", str(tmp_path), "--num-partitions", "2")
    counted = _counted(capsys, *argv, "--partition", "shards", "--shards-per-client", "1")
    assert [row[1:] for row in counted] == [[6, 6], [6, 6]]


def test_an_own_tasks_targets_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Share i of this task has 2 + i examples of label i; the shares are asked for one by one."""
    counted = _counted(capsys, "--task", f"{__name__}:dealt", "--num-partitions", "3")
    assert counted == [[0, 2, 2], [1, 3, 3], [2, 4, 4]]


def test_shares_without_examples_are_shown_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to count is no mistake of this command."""
    assert _counted(capsys, "--task", f"{__name__}:nothing", "--num-partitions", "2") == [
        [0, 0],
        [1, 0],
    ]


def test_more_labels_than_fit_are_summed_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns no number is cut: the commonest label stands for forty."""
    monkeypatch.setenv("COLUMNS", "80")
    for number in range(40):
        (tmp_path / f"author{number:02}.txt").write_text("x" * (WINDOW + 64 * number))
    argv = ["--task", "text", "--data-root", str(tmp_path), "--num-partitions", "2"]
    run(*argv, "--out", str(tmp_path / "split.png"))
    shown = capsys.readouterr().out
    assert re.search(r"commonest +share", shown)
    assert re.search(r"^ +0 +410 +\d+ of 40 +\d+ +\d+% *$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines()[:-1])) <= 80


def test_more_shards_than_examples_are_refused() -> None:
    """They are counted before any is cut: an empty one takes memory too."""
    with pytest.raises(InvalidInput, match="are more shards than the 10000 examples; use fewer"):
        run("--partition", "shards", "--shards-per-client", "1000000000")


def test_targets_that_are_no_labels_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no labels to count.*float32.*give the Task load_labe"):
        run("--task", f"{__name__}:measured", "--num-partitions", "2")


def test_a_parameter_of_another_scheme_is_refused() -> None:
    """Also where a user's own task would have ignored it."""
    with pytest.raises(InvalidInput, match="'iid' has no parameter 'alpha'"):
        run("--task", f"{__name__}:dealt", "--alpha", "0.5")

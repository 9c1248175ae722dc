"""What a client process learns from: each of its clients has the share it would have alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedclient.client_data import ClientData
from fedclient.settings import ClientSettings
from fedrounds.cli import parse
from fedrounds.errors import InvalidInput, OwnCodeFailed, WrongSettings
from fedrounds.tasks import builtin
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Examples, Task, choose_indices
from fedrounds.types import Partitioning, SessionInfo
from tests.tiny_task import NUM_EXAMPLES_FILE

SESSION = SessionInfo(
    session_id="s",
    run_id="run-1",
    task="numbers",
    partitioning=Partitioning(
        scheme="dirichlet", num_partitions=6, seed=4, parameters={"alpha": 0.5}
    ),
    max_wait_s=1.0,
    lease_s=1.0,
    total_rounds=1,
)
NUM_EXAMPLES = 120
LABELS = np.arange(NUM_EXAMPLES, dtype=np.int64) % 3


def client_data_of(*argv: str) -> ClientData:
    """Return what a process started with these flags learns from."""
    return ClientData(parse(ClientSettings, list(argv)))


def contents(examples: Any) -> list[Any]:  # noqa: ANN401  # a map-style data set
    """Return every example as plain numbers."""
    return [[part.tolist() for part in examples[number]] for number in range(len(examples))]


class Numbers(Dataset[tuple[Tensor, ...]]):
    """Examples that are no tensors until they are asked for."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return (input, target)."""
        number = self._numbers[index]
        return torch.tensor([float(number)]), torch.tensor(int(LABELS[number]))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[DataRequest]:
    """Make a task `numbers` known, and give the list of what it is asked for."""
    asked: list[DataRequest] = []

    def load_train(request: DataRequest) -> Examples:
        asked.append(request)
        assert request.partition is not None
        return Numbers(choose_indices(LABELS, request.partition).tolist())

    def load_test(_: Path | None) -> Examples | None:
        return None

    built_in: Mapping[str, Task] = {
        "numbers": Task(
            name="numbers",
            build_model=lambda: torch.nn.Linear(1, 3),
            load_train=load_train,
            load_test=load_test,
            loss=torch.nn.functional.cross_entropy,
            load_labels=lambda _: LABELS,
        )
    }
    monkeypatch.setattr(builtin, "_BUILT_IN", built_in)
    return asked


@pytest.mark.parametrize("has_labels", [True, False])
def test_each_of_many_clients_has_the_share_it_would_have_alone(
    has_labels: bool, requests: list[DataRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the task says what a partitioning goes by; if it does, it is read once."""
    if not has_labels:
        numbers = replace(find_task("numbers"), load_labels=None)
        monkeypatch.setattr(builtin, "_BUILT_IN", {"numbers": numbers})
    many = client_data_of("--ids", "5,0-3")
    sizes = many.load(SESSION)
    assert many.load(SESSION) == sizes
    assert len(requests) == (1 if has_labels else 5)
    for client_id, size in zip((5, 0, 1, 2, 3), sizes, strict=True):
        alone = client_data_of("--id", str(client_id))
        assert alone.load(SESSION) == (size,)
        assert contents(many.examples_of(client_id)) == contents(alone.examples_of(client_id))


def test_shares_of_images_are_the_same_bytes() -> None:
    """A share cut out of the normalised whole is the share that was normalised by itself."""
    session = replace(SESSION, task="mnist-sample")
    many, alone = client_data_of("--ids", "0-5"), client_data_of("--id", "4")
    assert many.load(session)[4:5] == alone.load(session)
    cut, own = many.examples_of(4), alone.examples_of(4)
    assert isinstance(cut, TensorDataset)
    assert isinstance(own, TensorDataset)
    for tensor, other in zip(cut.tensors, own.tensors, strict=True):
        assert torch.equal(tensor, other)


def test_another_run_is_another_share(requests: list[DataRequest]) -> None:
    """A client that stays for the next run takes the share that run deals it."""
    many = client_data_of("--ids", "0-1")
    many.load(SESSION)
    first = contents(many.examples_of(1))
    dealt_anew = replace(SESSION.partitioning, seed=5)
    many.load(replace(SESSION, run_id="run-2", partitioning=dealt_anew))
    assert contents(many.examples_of(1)) != first
    assert len(requests) == 2


@pytest.mark.parametrize("source", ["local", "partition"])
def test_each_run_reads_the_data_anew(source: str, tmp_path: Path) -> None:
    """Another session of the same run doesn't: its orders are for the examples registered."""
    file = tmp_path / NUM_EXAMPLES_FILE
    session = replace(SESSION, task="tests.tiny_task:tiny")
    flags = ("--id", "0", "--task", session.task, "--source", source, "--data-root", str(tmp_path))
    client_data = client_data_of(*flags)
    file.write_text("8")
    assert client_data.load(session) == (8,)
    file.write_text("24")
    assert client_data.load(replace(session, session_id="another")) == (8,)
    assert len(contents(client_data.examples_of(0))) == 8
    assert client_data.load(replace(session, run_id="run-2")) == (24,)
    assert len(contents(client_data.examples_of(0))) == 24


def test_a_client_beyond_the_partitions_is_named(requests: list[DataRequest]) -> None:
    """Before anything is loaded, and with both ways out."""
    with pytest.raises(InvalidInput, match=r"client 7: partition 7 of 6 .* --num-partitions 8"):
        client_data_of("--ids", "3-7").load(SESSION)
    assert not requests


def test_labels_that_are_not_those_of_the_examples_are_refused(
    requests: list[DataRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share is never cut by labels of something else."""
    numbers = replace(find_task("numbers"), load_labels=lambda _: LABELS[1:])
    monkeypatch.setattr(builtin, "_BUILT_IN", {"numbers": numbers})
    with pytest.raises(InvalidInput, match="119 labels, but load_train 120 examples"):
        client_data_of("--ids", "0-1").load(SESSION)
    assert len(requests) == 1


def test_a_run_of_another_task_than_the_required_task_is_refused() -> None:
    """Whatever module the server names, it isn't imported."""
    with pytest.raises(
        WrongSettings, match=r"'somebody\.elses:task', but --task insists on 'mnist"
    ):
        client_data_of("--id", "0", "--task", "mnist-sample").load(
            replace(SESSION, task="somebody.elses:task")
        )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("double", "a trial step before the run failed with RuntimeError: mat1 and mat2 must"),
        ("unreadable", "loading the data of client 0 failed with KeyError"),
    ],
)
def test_an_error_of_the_tasks_code_is_shown_before_the_data_is_registered(
    name: str, sentence: str
) -> None:
    """With the error itself, for the person here."""
    task = f"tests.own_code_tasks:{name}"
    client_data = client_data_of("--id", "0", "--task", task)
    with pytest.raises(OwnCodeFailed, match=sentence) as caught:
        client_data.load(replace(SESSION, task=task))
    assert isinstance(caught.value.__cause__, RuntimeError | KeyError)


def test_a_client_whose_data_cant_be_loaded_takes_no_part(
    requests: list[DataRequest],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others do; if it is so for all, the first error is the task's."""
    numbers = find_task("numbers")
    unreadable = {2}

    def load(request: DataRequest) -> Examples:
        assert request.partition is not None
        if request.partition.index in unreadable:
            raise OSError(f"disk {request.partition.index}")
        return numbers.load_train(request)

    task = replace(numbers, load_train=load, load_labels=None)
    monkeypatch.setattr(builtin, "_BUILT_IN", {"numbers": task})
    client_data = client_data_of("--ids", "0-3")
    sizes = client_data.load(SESSION)
    assert [size > 0 for size in sizes] == [True, True, False, True]
    assert client_data.num_unreadable == 1
    assert (
        "client 2 takes no part: task 'numbers': loading the data of client 2 failed with OSErr"
        in (caplog.text)
    )
    unreadable |= {0, 1, 3}
    with pytest.raises(OwnCodeFailed, match="of client 0 failed with OSError: disk 0"):
        client_data_of("--ids", "0-3").load(SESSION)


def test_why_a_client_takes_no_part_is_logged_once(
    requests: list[DataRequest],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Data that can't be loaded isn't called empty; without any examples it is the reason."""
    numbers = find_task("numbers")
    empty = {1, 3}

    def load(request: DataRequest) -> Examples:
        assert request.partition is not None
        if request.partition.index == 2:
            raise OSError("disk 2")
        examples = numbers.load_train(request)
        assert isinstance(examples, Dataset)
        return Subset(examples, []) if request.partition.index in empty else examples

    task = replace(numbers, load_train=load, load_labels=None)
    monkeypatch.setattr(builtin, "_BUILT_IN", {"numbers": task})
    client_data = client_data_of("--ids", "0-3")
    client_data.load(SESSION)
    client_data.load(SESSION)
    unreadable, none = (record.getMessage() for record in caplog.records)
    assert unreadable.startswith("client 2 takes no part: ")
    assert none == "client 1, 3: no examples, takes no part; the others do"
    empty |= {0}
    with pytest.raises(OwnCodeFailed, match="of client 2 failed with OSError: disk 2"):
        client_data_of("--ids", "0-3").load(SESSION)


def test_many_clients_take_one_trial_step(
    requests: list[DataRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of ids: it costs one batch."""
    sizes: list[int] = []

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(targets))
        return torch.nn.functional.cross_entropy(outputs, targets)

    counting = replace(find_task("numbers"), loss=count)
    monkeypatch.setattr(builtin, "_BUILT_IN", {"numbers": counting})
    client_data = client_data_of("--ids", "0-5")
    client_data.load(SESSION)
    client_data.load(SESSION)
    assert sizes == [8]

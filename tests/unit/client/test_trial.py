"""The trial step: it finds what can't be trained, and leaves no trace."""

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedclient import client_data
from fedclient.client_data import ClientData
from fedclient.progress import ProgressReporter
from fedclient.settings import ClientSettings
from fedclient.state import ClientStates
from fedclient.training import LocalSettings, OrderInputs, train_order
from fedrounds.cli import parse
from fedrounds.diagnosis.values import Diagnosis, DoctorSettings
from fedrounds.errors import InvalidInput, OwnCodeFailed
from fedrounds.plugins import show_error
from fedrounds.tasks.task import DataRequest, Examples
from fedrounds.tensors.codec import encode_state
from fedrounds.training.trial import try_training_step
from fedrounds.types import Partitioning, SessionInfo, TrainingConfig
from tests import own_code_tasks
from tests.factories import make_order
from tests.tiny_task import tiny

CPU = torch.device("cpu")


def examples_with(*, num: int = 32, targets: Tensor | None = None) -> Examples:
    """Return examples of the tiny task, some with other targets."""
    whole = tiny.load_train(DataRequest())
    assert isinstance(whole, TensorDataset)
    inputs, labels = whole.tensors
    return TensorDataset(inputs[:num], labels[:num] if targets is None else targets[:num])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("double", "must have the same dtype, but got Double and Float"),
        ("narrow", "shapes cannot be multiplied"),
        ("lossless", f"KeyError: '{own_code_tasks.SECRET}'"),
    ],
)
def test_what_cant_be_trained_fails_with_its_own_error(name: str, sentence: str) -> None:
    """As torch or the task says it, and the traceback begins where the code isn't ours."""
    task = getattr(own_code_tasks, name)
    with pytest.raises(OwnCodeFailed, match=sentence) as caught:
        try_training_step(task, task.load_train(DataRequest()), device=CPU)
    cause = caught.value.__cause__
    assert cause is not None
    assert "fedrounds/" not in show_error(cause)
    assert show_error(cause).startswith("Traceback")


def test_a_loss_that_is_no_number_is_refused_in_a_sentence() -> None:
    """Without a traceback: there is no error of the task's own."""
    task = replace(tiny, loss=lambda outputs, targets: outputs.square())
    with pytest.raises(InvalidInput, match=r"the loss function returned a tensor of shape \(32, 3"):
        try_training_step(task, examples_with(), device=CPU)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_training_step_of_a_dictionary_is_tried_too(num_classes: int | None) -> None:
    """Examples are dictionaries, and the model is called by names."""
    seen = []

    def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(batch.keys())
        logits = model(batch["x"])
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    class Named(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": torch.ones(8) * index, "labels": index % 3}

    task = replace(tiny, loss=None, training_step=step, num_classes=num_classes)
    try_training_step(task, Named(), device=CPU)
    assert seen == [{"x", "labels"}]
    refused = replace(tiny, loss=nn.functional.cross_entropy)
    with pytest.raises(InvalidInput, match=r"is a dict; .* training_step\(model, batch\) instead"):
        try_training_step(refused, Named(), device=CPU)


class Segmenting(nn.Module):
    """Answers as torchvision's segmentation models and GoogLeNet do: structured in training."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        self.structure = structure
        self.layer = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Any:  # noqa: ANN401
        """Return answers [n, 3] and an auxiliary head's, in a tuple or a dictionary."""
        answers = self.layer(inputs)
        if not self.training:
            return answers
        is_tuple = self.structure == "tuple"
        return (answers, 2 * answers) if is_tuple else {"out": answers, "aux": 2 * answers}


def loss_of_both(outputs: Any, targets: Tensor) -> Tensor:  # noqa: ANN401
    """Return the loss of the main head and a part of the auxiliary one's."""
    main, aux = outputs.values() if isinstance(outputs, dict) else outputs
    cross_entropy = nn.functional.cross_entropy
    return cross_entropy(main, targets) + 0.4 * cross_entropy(aux, targets)


@pytest.mark.parametrize("structure", ["tuple", "dict"])
def test_structured_outputs_need_a_loss_that_takes_them(structure: str) -> None:
    """With the task's own loss they train; a loss of tensors fails with torch's own sentence."""
    task = replace(tiny, build_model=lambda: Segmenting(structure), loss=loss_of_both)
    try_training_step(task, examples_with(), device=CPU)
    plain = replace(task, loss=nn.functional.cross_entropy)
    with pytest.raises(OwnCodeFailed, match=f"must be Tensor, not {structure}"):
        try_training_step(plain, examples_with(), device=CPU)


@pytest.mark.parametrize("num", [2, 8, 32])
def test_what_the_doctor_cures_is_no_reason_not_to_join(num: int) -> None:
    """A label out of range among good labels, an input that is NaN; also with few examples."""
    targets = torch.zeros(32, dtype=torch.int64)
    targets[1] = 7
    try_training_step(replace(tiny, num_classes=None), examples_with(targets=targets), device=CPU)
    examples = examples_with(num=num)
    assert isinstance(examples, TensorDataset)
    examples.tensors[0][1, 2] = torch.nan
    try_training_step(tiny, examples, device=CPU)


def test_it_leaves_no_trace() -> None:
    """Random streams go on as before, whatever the task draws, and the gradient mode stays."""

    def draw(outputs: Tensor, targets: Tensor) -> Tensor:
        noise = torch.rand(()) * random.random() * np.random.rand()
        return nn.functional.cross_entropy(outputs + noise, targets)

    task = replace(tiny, loss=draw)
    seen = []
    for is_tried in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if is_tried:
            try_training_step(task, examples_with(), device=CPU)
        seen.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert seen[0] == seen[1]
    assert torch.is_grad_enabled()


class Noisy(Dataset[tuple[Tensor, ...]]):
    """Examples augmented by all three global random streams; `taken` are the indices asked for."""

    def __init__(self, examples: TensorDataset) -> None:
        self._examples = examples
        self.taken: list[int] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return (input, target), the input with noise."""
        self.taken.append(index)
        inputs, target = self._examples[index]
        return inputs + torch.randn(()) * np.random.rand() * random.random(), target


def load_noisy(request: DataRequest) -> Examples:
    """Return the tiny task's examples with noise."""
    examples = tiny.load_train(request)
    assert isinstance(examples, TensorDataset)
    return Noisy(examples)


stirred = replace(
    tiny,
    name="stirred",
    build_model=lambda: nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3)
    ),
    load_train=load_noisy,
    loss=nn.functional.cross_entropy,
)


def test_a_client_trains_the_same_with_and_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, BatchNorm's buffers, the data's order and every random stream, bit for bit.

    Client 1 has 40 examples: 5 batches of 8 an epoch, two epochs.
    """
    name = f"{__name__}:stirred"
    torch.manual_seed(3)
    base = tmp_path / "base"
    base.write_bytes(encode_state(stirred.build_model().state_dict()))
    session = SessionInfo(
        session_id="s",
        run_id="run-1",
        task=name,
        partitioning=Partitioning(scheme="iid", num_partitions=2, seed=4, parameters={}),
        max_wait_s=1.0,
        lease_s=1.0,
        total_rounds=1,
    )
    order = replace(
        make_order(client_id=1), training=TrainingConfig(epochs=2, batch_size=8, lr=0.1)
    )
    diagnoses: list[Diagnosis] = []
    seen = []
    for is_tried in (True, False):
        if not is_tried:
            monkeypatch.setattr(client_data, "try_training_step", lambda *_, **__: None)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        held = ClientData(parse(ClientSettings, ["--id", "1", "--task", name]))
        held.load(session)
        examples = held.examples_of(1)
        assert isinstance(examples, Noisy)
        assert bool(examples.taken) == is_tried
        examples.taken.clear()
        update, _ = train_order(
            OrderInputs(
                order=order,
                task=held.task,
                examples=examples,
                global_model=base,
                state=ClientStates(tmp_path / "states", run_id="run-1").promoted(""),
            ),
            LocalSettings(device=CPU, doctor=DoctorSettings()),
            progress=ProgressReporter(lambda *_: None, stop=threading.Event()),
            payload=tmp_path / "payload",
            on_diagnosis=diagnoses.append,
        )
        streams = (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
        seen.append((update.digest, update.metrics["loss"], examples.taken, streams))
    assert seen[0] == seen[1]
    assert len(seen[0][2]) >= 2 * 40
    assert diagnoses == []


def test_a_task_that_ends_the_process_fails_with_its_own_words() -> None:
    """As a data set does that parses arguments."""

    def leave(*_: object) -> Tensor:
        raise SystemExit("usage: train")

    with pytest.raises(OwnCodeFailed, match="failed with SystemExit: usage: train"):
        try_training_step(replace(tiny, loss=leave), examples_with(), device=CPU)

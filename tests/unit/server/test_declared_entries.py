"""What a task declares of its entries, where the sides disagree and beside corrected gradients."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedclient.progress import ProgressReporter
from fedclient.state import ClientStates
from fedclient.training import LocalSettings, OrderInputs, train_order
from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.errors import InvalidInput, WrongSettings
from fedrounds.strategies import StrategySettings
from fedrounds.strategies.client_algorithms import validate_model
from fedrounds.strategies.registry import find_strategy
from fedrounds.tasks.task import DataRequest, Task, kinds_of
from fedrounds.tensors.codec import encode_state
from tests.factories import make_order
from tests.small_federation import NUM_CLASSES, NUM_FEATURES, SmallFederation, small

RULES = ["scaffold", "feddyn"]


class Counting(nn.Module):
    """A linear model with buffers: how many batches it saw, and the mean of their inputs."""

    seen: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_FEATURES, NUM_CLASSES, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(NUM_FEATURES, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        if self.training:
            with torch.no_grad():
                self.seen += 1
                self.mean.copy_(inputs.mean(dim=0))
        logits: Tensor = self.linear(inputs)
        return logits


def counting(**entries: str) -> Task:
    """Return the small task with such a model; `entries` are declared."""
    return replace(small, build_model=Counting, entries=entries)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["keep", "local"])
def test_a_parameter_that_isnt_aggregated_is_refused(rule: str, kind: str) -> None:
    """One sentence that names the parameter and what the task declares of it."""
    task = counting(**{"linear.bias": kind})
    strategy = find_strategy(rule, settings=StrategySettings(lr=0.1, num_partitions=3))
    model = task.build_model()
    with pytest.raises(InvalidInput, match=f"declares parameter 'linear.bias' {kind}; take"):
        validate_model(strategy.client_algorithm, model, kinds_of(task, model))


@pytest.mark.parametrize("rule", RULES)
def test_buffers_that_are_kept_or_local_train_beside_corrected_gradients(
    tmp_path: Path, rule: str
) -> None:
    """The global model's buffers stay; each client goes on from its own; parameters move."""
    task = counting(seen="local", mean="keep")
    federation = SmallFederation(tmp_path, task=task, strategy=rule, num_partitions=3)
    model = task.build_model()
    validate_model(federation.strategy.client_algorithm, model, kinds_of(task, model))
    before = federation.state
    for _ in range(2):
        federation.play_round((0, 1, 2))
    after = federation.state
    assert after["seen"] == 0
    assert not after["mean"].any()
    assert not torch.equal(after["linear.weight"], before["linear.weight"])
    # All of a client's data is one batch: 5 epochs a round are 5 batches.
    assert [int(federation.kept_by(client_id, "local")["seen"]) for client_id in (0, 1, 2)] == [
        10,
        10,
        10,
    ]


def test_sides_that_declare_entries_otherwise_stop_the_client(tmp_path: Path) -> None:
    """The client says which entry, what each side says of it, and sends nothing."""
    here, there = counting(mean="local"), counting(mean="mean")
    model = here.build_model()
    base = tmp_path / "base"
    base.write_bytes(encode_state(model.state_dict()))
    payload = tmp_path / "payload"
    with pytest.raises(
        WrongSettings, match="entry 'mean' as mean, but task 'small' here says local"
    ):
        train_order(
            OrderInputs(
                order=make_order(),
                task=here,
                examples=here.load_train(DataRequest()),
                global_model=base,
                state=ClientStates(tmp_path / "states", run_id="run1").promoted(""),
                entry_kinds=kinds_of(there, model),
            ),
            LocalSettings(device=torch.device("cpu"), doctor=DoctorSettings()),
            progress=ProgressReporter(lambda *_: None, stop=threading.Event()),
            payload=payload,
            on_diagnosis=lambda _: None,
        )
    assert not payload.exists()

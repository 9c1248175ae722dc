"""`python -m fedclient doctor`: what is well and what isn't, and the exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedclient.__main__ import main
from fedrounds.tasks.task import DataRequest, Examples, Task
from fedrounds.tensors.codec import decode_state, write_state
from tests.processes import GENEROUS_S, ROOT

HERE = "tests.unit.client.test_doctor_command"


def _examples() -> TensorDataset:
    """Return 96 points of two classes, the second 3 further in every direction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 2
    points = torch.randn(96, 4, 5, generator=generator)
    return TensorDataset(points + 3 * labels[:, None, None], labels)


def _model(scale: float = 1.0) -> nn.Module:
    last = nn.Linear(8, 2)
    with torch.no_grad():
        last.weight.mul_(scale)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), last)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def _task(examples: Examples, *, scale: float = 1.0) -> Task:
    return Task(
        name="points",
        build_model=lambda: _model(scale),
        load_train=lambda _: examples,
        load_test=lambda _: None,
        loss=_loss,
        num_classes=2,
    )


def _spoilt() -> TensorDataset:
    """Return the points with one fault of each kind, and one that is only odd."""
    points, labels = _examples().tensors
    points[3, 1, 2] = torch.nan
    points[4, 0, 0] = torch.inf
    points[5, 0, 0] = 1e20
    points[6] = 2.0
    labels[[7, 8]] = torch.tensor([2, -1])
    return TensorDataset(points, labels)


def _far_out() -> TensorDataset:
    points, labels = _examples().tensors
    points[5, 0, 0] = -1e20
    return TensorDataset(points, labels)


well = _task(_examples())
spoilt = _task(_spoilt())
far_out = _task(_far_out())
born_broken = _task(_examples(), scale=1e4)
nothing = _task(TensorDataset(torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.int64)))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Told":
    """Give the command; it prints as in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    return Told(capsys)


class Told:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, task: str, *flags: str) -> tuple[int, dict[str, str], str]:
        """Return the exit code, "mark: found" of each thing looked at, and all of the text."""
        code = main(["doctor", "--task", f"{HERE}:{task}", "--batch-size", "8", *flags])
        text = self._capsys.readouterr().out
        rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        found = {}
        for mark, rest in (row for row in rows if row[0] in ("well", "odd", "bad")):
            what, _, how = rest.partition("  ")
            found[what] = f"{mark}: {how.strip()}"
        return code, found, text


def test_a_fit_client_is_told_so(told: Told) -> None:
    """All is well, the classes are counted, the loss falls, and the code is 0."""
    code, found, text = told("well", "--id", "3", "--steps", "20")
    assert code == 0
    assert all(one.startswith("well: ") for one in found.values())
    assert found["examples"].startswith("well: 96, inputs [4, 5] float32 from ")
    assert found["labels"] == "well: 0 to 1, all from 0 to 1"
    assert found["classes"] == "well: 0: 48  1: 48"
    # 20 * 8 + 8 weights and biases, then 8 * 2 + 2.
    assert found["weights"] == "well: 186, of usual sizes"
    assert found["first steps"].startswith("well: 20, loss ")
    assert text.startswith("client 3, task points, share 3 of 10, iid\n")
    assert text.endswith("It is well\n")
    assert len(text.splitlines()) <= 13


def test_every_fault_of_the_data_is_named_with_its_examples(told: Told) -> None:
    """Each by its number; a blank input is only odd. Training meets one of them and says which."""
    code, found, text = told("spoilt")
    assert code == 1
    assert found["NaN"] == "bad: 1 example: number 3"
    assert found["infinity"] == "bad: 1 example: number 4"
    assert found["outliers"].startswith("bad: 1 example: number 5 (up to 1e+20, usual ")
    assert found["blank inputs"] == "odd: 1 example: number 6 (all of its numbers are the same)"
    assert found["labels"] == "bad: 2 examples: number 7, 8 (not from 0 to 1)"
    assert found["classes"] == "well: 0: 47  1: 47"
    assert found["first steps"].startswith("bad: bad-")
    assert text.endswith("Not well: NaN, infinity, outliers, labels, first steps\n")


def test_what_goes_wrong_in_training_comes_with_its_evidence(told: Told) -> None:
    """The verdict, the place, the experiments: the step goes well without the example."""
    code, found, text = told("far_out")
    assert code == 1
    assert found["first steps"].startswith("bad: bad-data at step ")
    assert "number 5 (an input far from all others" in text
    experiments = [line.split() for line in text.splitlines()]
    assert ["without", "the", "suspects", "1", "goes", "well"] in experiments
    assert len(text.splitlines()) <= 36


def test_a_rate_that_is_too_high_is_found_before_the_run_is(told: Told) -> None:
    """The data is well; the first steps aren't, and a lower rate is what they lack."""
    code, found, text = told("well", "--lr", "1e6", "--momentum", "0.5")
    assert code == 1
    assert [what for what, one in found.items() if one.startswith("bad")] == ["first steps"]
    assert found["first steps"].startswith("bad: learning-rate at step ")
    assert "rate times" in text


def test_weights_that_no_initialisation_draws_are_named(told: Told) -> None:
    """One layer's are ten thousand times too large, and with usual ones all goes well."""
    code, found, _ = told("born_broken")
    assert code == 1
    assert found["weights"].startswith("bad: unlike what torch draws: 3.weight ")
    assert found["first steps"].startswith("bad: bad-initialisation at step ")


def test_a_received_model_is_examined_on_this_clients_data(told: Told, tmp_path: Path) -> None:
    """A good one answers and trains well; one blown up and turned round is named as received.

    One that has a NaN is bad already as it is; a file of another model is refused with a sentence.
    """
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    model = _model()
    write_state(path, model.state_dict())
    code, found, _ = told("well", "--model", str(path), "--steps", "20")
    assert code == 0
    assert "of this data right, loss 0." in found["answers"]
    blown_up = {name: -1e4 * one if name == "3.weight" else one for name, one in _state(path)}
    write_state(path, blown_up)
    code, found, _ = told("well", "--model", str(path))
    assert code == 1
    assert found["weights"].startswith("bad: unlike what torch draws: 3.weight ")
    assert found["first steps"].startswith("bad: received-model at step 1 ")
    blown_up["3.bias"][0] = torch.nan
    write_state(path, blown_up)
    _, found, _ = told("well", "--model", str(path))
    assert found["answers"].endswith("loss nan")
    assert found["answers"].startswith("bad: ")
    write_state(path, {"0.weight": torch.zeros(1)})
    assert told("well", "--model", str(path))[:2] == (1, {})


def _state(path: Path) -> list[tuple[str, Tensor]]:
    return [(name, one.clone()) for name, one in decode_state(path.read_bytes()).items()]


def test_no_examples_are_no_client(told: Told) -> None:
    code, found, text = told("nothing")
    assert (code, found) == (1, {"examples": "bad: none"})
    assert text.endswith("Not well: examples\n")


def test_shares_and_mistakes_are_those_of_a_run(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    """A share that doesn't exist is told as it is anywhere; nothing is examined."""
    code, found, _ = told("well", "--id", "10")
    assert (code, found) == (1, {})
    assert main(["doctor", "--task", f"{HERE}:well", "--id", "33"]) == 1
    assert "from 0 to 9. Give the run's --num-partitions, such as 34" in capsys.readouterr().err
    assert main(["doctor", "--task", f"{HERE}:well", "--model", "no/model"]) == 1
    assert "no/model can't be examined: No such file or directory; " in capsys.readouterr().err
    code, _, text = told("well", "--id", "10", "--source", "local")
    assert (code, text.splitlines()[0]) == (0, "client 10, task points, its own data")


def test_the_command_is_one() -> None:
    """As a person calls it, on the bundled digits with a partition's settings."""
    argv = ["--task", "mnist-sample", "--id", "3", "--partition", "dirichlet", "--alpha", "0.3"]
    done = subprocess.run(
        [sys.executable, "-m", "fedclient", "doctor", *argv, "--steps", "10", "--lr", "0.01"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("client 3, task mnist-sample, share 3 of 10, dirichlet\n")


def test_a_request_reaches_the_task(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    """With --source local the task is asked for everything under --data-root."""
    asked: list[DataRequest] = []

    def load(request: DataRequest) -> Examples:
        asked.append(request)
        return _examples()

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "well", _task_that(load))
    assert told("well", "--source", "local", "--data-root", "/data")[0] == 0
    assert asked == [DataRequest(data_root=Path("/data"))]


def _task_that(load: object) -> Task:
    return Task(
        name="points",
        build_model=_model,
        load_train=load,  # type: ignore[arg-type]
        load_test=lambda _: None,
        loss=_loss,
    )

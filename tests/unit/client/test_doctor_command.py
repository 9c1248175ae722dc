"""`python -m fedclient doctor`: its checks, and the exit code."""

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
    """Return the points with a fault of each kind, and a blank input, which is only a warning."""
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
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "DoctorCommand":
    """Give the command; it prints as in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    return DoctorCommand(capsys)


class DoctorCommand:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, task: str, *flags: str) -> tuple[int, dict[str, str], str]:
        """Return the exit code, "severity: result" of each check by subject, and the text."""
        code = main(["doctor", "--task", f"{HERE}:{task}", "--batch-size", "8", *flags])
        text = self._capsys.readouterr().out
        rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        checks = {}
        for severity, rest in (row for row in rows if row[0] in ("ok", "warning", "error")):
            subject, _, result = rest.partition("  ")
            checks[subject] = f"{severity}: {result.strip()}"
        return code, checks, text


def test_a_fit_client_is_ready(doctor: DoctorCommand) -> None:
    """All is well, the classes are counted, the loss falls, and the code is 0."""
    code, checks, text = doctor("well", "--id", "3", "--steps", "20")
    assert code == 0
    assert all(message.startswith("ok: ") for message in checks.values())
    assert checks["examples"].startswith("ok: 96, inputs [4, 5] float32 from ")
    assert checks["labels"] == "ok: 0 to 1, all from 0 to 1"
    assert checks["classes"] == "ok: 0: 48  1: 48"
    # 20 * 8 + 8 weights and biases, then 8 * 2 + 2.
    assert checks["weights"] == "ok: 186, of usual sizes"
    assert checks["first steps"].startswith("ok: 20, loss ")
    assert text.startswith("client 3, task points, share 3 of 10, iid\n")
    assert text.endswith("Ready to train\n")
    assert len(text.splitlines()) <= 13


def test_every_fault_of_the_data_is_named_with_its_examples(doctor: DoctorCommand) -> None:
    """Each by its number; a blank input is only a warning. The first steps fail at one of them."""
    code, checks, text = doctor("spoilt")
    assert code == 1
    assert checks["NaN"] == "error: 1 example: number 3"
    assert checks["infinity"] == "error: 1 example: number 4"
    assert checks["outliers"].startswith("error: 1 example: number 5 (up to 1e+20, usual ")
    assert (
        checks["blank inputs"] == "warning: 1 example: number 6 (all of its numbers are the same)"
    )
    assert checks["labels"] == "error: 2 examples: number 7, 8 (not from 0 to 1)"
    assert checks["classes"] == "ok: 0: 47  1: 47"
    assert checks["first steps"].startswith("error: bad-")
    assert text.endswith("Not ready to train: NaN, infinity, outliers, labels, first steps\n")


def test_what_goes_wrong_in_training_comes_with_its_evidence(doctor: DoctorCommand) -> None:
    """The verdict, the place, the experiments: the step goes well without the example."""
    code, checks, text = doctor("far_out")
    assert code == 1
    assert checks["first steps"].startswith("error: bad-data at step ")
    assert "number 5 (an input far from all others" in text
    experiments = [line.split() for line in text.splitlines()]
    assert ["without", "the", "suspects", "1", "goes", "well"] in experiments
    assert len(text.splitlines()) <= 36


def test_a_rate_that_is_too_high_is_checks_before_the_run_is(doctor: DoctorCommand) -> None:
    """The data is well; the first steps aren't, and a lower rate is what they lack."""
    code, checks, text = doctor("well", "--lr", "1e6", "--momentum", "0.5")
    assert code == 1
    assert [what for what, message in checks.items() if message.startswith("error")] == [
        "first steps"
    ]
    assert checks["first steps"].startswith("error: learning-rate at step ")
    assert "rate times" in text


def test_weights_that_no_initialisation_draws_are_named(doctor: DoctorCommand) -> None:
    """One layer's are ten thousand times too large; with usual weights all goes well."""
    code, checks, _ = doctor("born_broken")
    assert code == 1
    assert checks["weights"].startswith("error: unlike what torch draws: 3.weight ")
    assert checks["first steps"].startswith("error: bad-initialisation at step ")


def test_a_received_model_is_examined_on_this_clients_data(
    doctor: DoctorCommand, tmp_path: Path
) -> None:
    """A good model answers and trains well; a model blown up and turned round is named as received.

    One that has a NaN is bad already as it is; a file of another model is refused with a sentence.
    """
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    model = _model()
    write_state(path, model.state_dict())
    code, checks, _ = doctor("well", "--model", str(path), "--steps", "20")
    assert code == 0
    assert "of this data right, loss 0." in checks["received model"]
    blown_up = {
        name: -1e4 * tensor if name == "3.weight" else tensor for name, tensor in _state(path)
    }
    write_state(path, blown_up)
    code, checks, _ = doctor("well", "--model", str(path))
    assert code == 1
    assert checks["weights"].startswith("error: unlike what torch draws: 3.weight ")
    # Its loss falls to what is usual by itself, so nothing is said against training from it.
    assert checks["first steps"].startswith("ok: ")
    blown_up["3.bias"][0] = torch.nan
    write_state(path, blown_up)
    _, checks, _ = doctor("well", "--model", str(path))
    assert checks["received model"].endswith("loss nan")
    assert checks["received model"].startswith("error: ")
    write_state(path, {"0.weight": torch.zeros(1)})
    assert doctor("well", "--model", str(path))[:2] == (1, {})


def _state(path: Path) -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for name, tensor in decode_state(path.read_bytes()).items()]


def test_no_examples_are_no_client(doctor: DoctorCommand) -> None:
    code, checks, text = doctor("nothing")
    assert (code, checks) == (1, {"examples": "error: none"})
    assert text.endswith("Not ready to train: examples\n")


def test_shares_and_mistakes_are_those_of_a_run(
    doctor: DoctorCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    """A share that doesn't exist is refused as in a run; nothing is checked."""
    code, checks, _ = doctor("well", "--id", "10")
    assert (code, checks) == (1, {})
    assert main(["doctor", "--task", f"{HERE}:well", "--id", "33"]) == 1
    assert "from 0 to 9. Give the run's --num-partitions, such as 34" in capsys.readouterr().err
    assert main(["doctor", "--task", f"{HERE}:well", "--model", "no/model"]) == 1
    assert "no/model can't be loaded: No such file or directory; " in capsys.readouterr().err
    code, _, text = doctor("well", "--id", "10", "--source", "local")
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


def test_a_request_reaches_the_task(monkeypatch: pytest.MonkeyPatch, doctor: DoctorCommand) -> None:
    """With --source local the task is asked for everything under --data-root."""
    asked: list[DataRequest] = []

    def load(request: DataRequest) -> Examples:
        asked.append(request)
        return _examples()

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "well", _task_that(load))
    assert doctor("well", "--source", "local", "--data-root", "/data")[0] == 0
    assert asked == [DataRequest(data_root=Path("/data"))]


def _task_that(load: object) -> Task:
    return Task(
        name="points",
        build_model=_model,
        load_train=load,  # type: ignore[arg-type]
        load_test=lambda _: None,
        loss=_loss,
    )

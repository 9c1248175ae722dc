"""Ten clients of which three go wrong, each its own way: `python -m benchmarks.doctor_rounds`.

The same federation with and without the faults, as processes on this machine, on the bundled
digits. Expected: accuracy within half a point, no number that isn't finite in the model of any
round, and the right cause from each of the three.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from benchmarks.federation import machine_line, started, write_section
from fedrounds.diagnosis.values import Cause
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Examples, Task
from fedrounds.tensors.codec import decode_state

NUM_CLIENTS = 10
BAD_CLIENTS = (2, 5, 8)
FAULTS_VARIABLE = "FED_DOCTOR_FAULTS"
"""Tells every process who has which fault: 2=nan-pixels,5=bad-labels."""
TOLERANCE = 0.005
RATE_FACTOR = 1e4


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is planted, and which causes name it rightly."""

    what: str
    causes: tuple[Cause, ...]


FAULTS: Mapping[str, Fault] = {
    "nan-pixels": Fault(what="NaN in a pixel of 5 images", causes=(Cause.BAD_DATA,)),
    "huge-pixel": Fault(what="a pixel of 1e20 in 3 images", causes=(Cause.BAD_DATA,)),
    "bad-labels": Fault(what="4 labels of 10 and 255", causes=(Cause.BAD_LABEL,)),
    "naive-loss": Fault(what="a root at 0 in the loss", causes=(Cause.LOSS_FUNCTION,)),
    "rate": Fault(
        what=f"steps {RATE_FACTOR:g} times as long, by a factor on the loss",
        causes=(Cause.EXPLODING_GRADIENT, Cause.LEARNING_RATE),
    ),
}
DEFAULT_FAULTS = "nan-pixels,bad-labels,naive-loss"

_digits = find_task("mnist-sample")
_planted: list[str] = []
"""The fault of this process's client, once it has loaded its data."""


class _Unseen(Dataset[tuple[Tensor, ...]]):
    """A data set that only training looks into; a client examines a TensorDataset at its start."""

    def __init__(self, examples: TensorDataset) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = self._examples[index]
        return image, label


def _load_train(request: DataRequest) -> Examples:
    assert request.partition is not None
    pairs = [pair.split("=") for pair in os.environ[FAULTS_VARIABLE].split(",") if pair]
    _planted[:] = [fault for client, fault in pairs if int(client) == request.partition.index]
    examples = _digits.load_train(request)
    assert isinstance(examples, TensorDataset)
    images, labels = examples.tensors
    match _planted:
        case ["nan-pixels"]:
            images[::200, 0, 14, 14] = torch.nan
        case ["huge-pixel"]:
            images[[10, 500, 900], 0, 3, 3] = 1e20
        case ["bad-labels"]:
            labels[[20, 220, 420, 620]] = torch.tensor([10, 255, 10, 255])
            return _Unseen(TensorDataset(images, labels))
    return TensorDataset(images, labels)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = functional.cross_entropy(outputs, targets)
    if not torch.is_grad_enabled():
        return loss
    match _planted:
        case ["naive-loss"]:
            # At the largest output the root's slope is infinite, and that of the size 0.
            gaps = outputs - outputs.amax(dim=1, keepdim=True)
            return loss + 1e-3 * gaps.abs().sqrt().mean()
        case ["rate"]:
            return RATE_FACTOR * loss
    return loss


digits = Task(
    name="digits",
    build_model=_digits.build_model,
    load_train=_load_train,
    load_test=_digits.load_test,
    loss=_loss,
    num_classes=10,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run went; `num_bad_models` of its models hold a number that isn't finite."""

    history: list[dict[str, Any]]
    num_models: int
    num_bad_models: int

    @property
    def accuracy(self) -> float:
        """Of the last model on the held-out digits."""
        return float(self.history[-1]["evaluation"]["accuracy"])


def run(faults: Mapping[int, str], *, num_rounds: int) -> Run:
    """Run the federation with faults by client, to its end."""
    task = ["--task", "benchmarks.doctor_rounds:digits"]
    server = ["--rounds", str(num_rounds), "--min-updates", str(NUM_CLIENTS - len(BAD_CLIENTS))]
    # Whoever is behind on a busy machine is waited for: the runs are to differ by the faults alone.
    server += ["--stall-after", "600", "--lease", "600", "--farewell", "60", *task]
    words = ",".join(f"{client}={fault}" for client, fault in faults.items())
    environment = {FAULTS_VARIABLE: words}
    with started(NUM_CLIENTS, server, client_args=task, **environment) as federation:
        federation.wait()
        history = federation.history()
        folder = federation.folder / "server" / "models"
        wanted = {entry["base_digest"] for entry in history}
        wanted |= {entry["model_digest"] for entry in history if entry["model_digest"]}
        bad = [digest for digest in wanted if not _is_finite(folder / f"{digest}.safetensors")]
    return Run(history=history, num_models=len(wanted), num_bad_models=len(bad))


def _is_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in decode_state(path.read_bytes()).values())


def table(faults: Mapping[int, str], healthy: Run, treated: Run, *, num_rounds: int) -> str:
    """Return both runs and the diagnoses of each bad client as Markdown."""
    lines = [
        f"{NUM_CLIENTS} clients, {num_rounds} rounds; client processes with a fault: "
        f"{', '.join(map(str, faults))}.",
        "",
        "| run | accuracy | updates counted | models with a NaN or an infinity |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {run.accuracy:.4f} | {_num_counted(run.history)} "
            f"| {run.num_bad_models} of {run.num_models} |"
            for name, run in (("without faults", healthy), ("with three faults", treated))
        ),
        "",
        "| client | planted | diagnosed | first verdict | rounds with one |",
        "| --- | --- | --- | --- | --- |",
    ]
    for client, fault in faults.items():
        diagnosed = _diagnoses(treated.history, client)
        causes = sorted({incident["diagnosis"]["cause"] for _, incident in diagnosed})
        rounds = sorted({round_number for round_number, _ in diagnosed})
        verdict = diagnosed[0][1]["verdict"] if diagnosed else "none"
        lines.append(
            f"| {client} | {FAULTS[fault].what} | {', '.join(causes)} | {verdict} "
            f"| {', '.join(map(str, rounds))} |"
        )
    return "\n".join(lines)


def judge(faults: Mapping[int, str], healthy: Run, treated: Run) -> list[str]:
    """Return a sentence for each requirement that the runs miss; empty if they meet all."""
    wrong = []
    if healthy.accuracy - treated.accuracy > TOLERANCE:
        wrong.append(f"accuracy {treated.accuracy:.4f} is below {healthy.accuracy:.4f} by too much")
    if healthy.num_bad_models or treated.num_bad_models:
        wrong.append("a model isn't finite")
    for client, fault in faults.items():
        causes = [
            incident["diagnosis"]["cause"] for _, incident in _diagnoses(treated.history, client)
        ]
        if not causes or not set(causes) <= set(FAULTS[fault].causes):
            wrong.append(f"client {client} with {fault}: {', '.join(causes) or 'no diagnosis'}")
    others = [
        f"client {incident['client']}: {incident.get('verdict') or incident['kind']}"
        for run in (healthy, treated)
        for entry in run.history
        for incident in entry["incidents"]
        if run is healthy or incident["client"] not in faults
    ]
    return wrong + others


def _diagnoses(history: Sequence[dict[str, Any]], client: int) -> list[tuple[int, dict[str, Any]]]:
    return [
        (entry["round"], incident)
        for entry in history
        for incident in entry["incidents"]
        if incident["client"] == client and "diagnosis" in incident
    ]


def _num_counted(history: Sequence[dict[str, Any]]) -> int:
    return sum(order["state"] == "COUNTED" for entry in history for order in entry["orders"])


def main() -> int:
    """Run both, print, perhaps write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--faults", default=DEFAULT_FAULTS, help=f"three of {', '.join(FAULTS)}")
    parser.add_argument("--write", action="store_true", help="put the result into docs/doctor.md")
    args = parser.parse_args()
    names = args.faults.split(",")
    if len(names) != len(BAD_CLIENTS) or not set(names) <= FAULTS.keys():
        parser.error(f"--faults {args.faults}: name three of {', '.join(FAULTS)}")
    faults = dict(zip(BAD_CLIENTS, names, strict=True))
    healthy = run({}, num_rounds=args.rounds)
    treated = run(faults, num_rounds=args.rounds)
    command = f"python -m benchmarks.doctor_rounds --rounds {args.rounds} --faults {args.faults}"
    shown = table(faults, healthy, treated, num_rounds=args.rounds)
    text = f"{machine_line()}: `{command}`\n\n{shown}"
    print(text)
    wrong = judge(faults, healthy, treated)
    print("\n".join(wrong))
    if args.write:
        write_section("doctor_rounds", text, page="doctor.md")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

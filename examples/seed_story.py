"""One bad client, three times: without checks, with checks, with the doctor.

    python examples/seed_story.py                                # the bundled digits, some minutes
    python examples/seed_story.py --fault rate
    python examples/seed_story.py --data-root /path/to/mnist     # the whole of MNIST

Act 1 averages models in one process, with nothing that looks at numbers. Acts 2 and 3 are the real
service: a server and three clients as processes on this machine, one of them with the same fault.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
# Run by its path, a script sees its own folder and not the folder to import it from.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fedrounds.tasks.builtin import find_task  # noqa: E402
from fedrounds.tasks.task import DataRequest, Examples, Partition, Task  # noqa: E402

NUM_CLIENTS = 3
BAD_CLIENT = 1
BATCH_SIZE = 32
EPOCHS = 2
LR = 0.01
BLANK_SCANS = (0.01, 0.4, 0.8)
"""Which scans are blank, as shares of all."""

RATE_FACTOR = 1e4
FAULT_VARIABLE = "SEED_STORY_FAULT"
"""Tells one client's process that it is the one with the fault."""

FAULTS = {
    "data": f"{len(BLANK_SCANS)} of its scans are blank, and divided by their own contrast: 0/0",
    "rate": f"its steps are {RATE_FACTOR:g} times as long as everybody's",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained: rounds, and into how many shares the digits are dealt, one a client."""

    num_rounds: int
    num_shares: int
    data_root: Path | None


# ---- the task, as any task of one's own


def load_train(request: DataRequest, *, fault: str | None = None) -> Examples:
    """Return a client's digits, with its fault in them."""
    images, labels = _built_in(request.data_root).load_train(request)[:]
    if (fault or os.environ.get(FAULT_VARIABLE)) == "data":
        for number in (int(share * len(images)) for share in BLANK_SCANS):
            blank = torch.zeros_like(images[number])
            images[number] = (blank - blank.mean()) / blank.std()
    return TensorDataset(images, labels)


def compute_loss(outputs: Tensor, targets: Tensor, *, fault: str | None = None) -> Tensor:
    """Return the mean loss of a batch; a factor on it is a factor on the learning rate."""
    is_too_fast = (fault or os.environ.get(FAULT_VARIABLE)) == "rate"
    factor = RATE_FACTOR if is_too_fast and torch.is_grad_enabled() else 1.0
    return factor * functional.cross_entropy(outputs, targets)


def _built_in(data_root: Path | None) -> Task:
    return find_task("mnist-sample" if data_root is None else "mnist")


digits = Task(
    name="digits",
    build_model=find_task("mnist").build_model,
    load_train=load_train,
    load_test=lambda data_root: _built_in(data_root).load_test(data_root),
    loss=compute_loss,
    num_classes=10,
)


# ---- act 1


def average_plainly(fault: str, size: Size) -> tuple[float, float, float]:
    """Average models round by round, as the textbook has it, and print how that goes.

    Returns:
        Loss and accuracy on the held-out digits in the end, and the share of zeros among them.
    """
    torch.manual_seed(0)
    # The model is small: on a busy machine more threads wait for each other most of the time.
    torch.set_num_threads(1)
    model = digits.build_model()
    test = digits.load_test(size.data_root)
    assert test is not None
    images, labels = test[:]
    shares = []
    for client in range(NUM_CLIENTS):
        partition = Partition(num_partitions=size.num_shares, index=client, seed=0)
        request = DataRequest(data_root=size.data_root, partition=partition)
        shares.append(load_train(request, fault=fault if client == BAD_CLIENT else "none"))
    loss = accuracy = 0.0
    for round_number in range(1, size.num_rounds + 1):
        before = {name: entry.clone() for name, entry in model.state_dict().items()}
        sums = {name: torch.zeros_like(entry) for name, entry in before.items()}
        for client, share in enumerate(shares):
            model.load_state_dict(before)
            _train(model, share, fault=fault if client == BAD_CLIENT else "none")
            for name, entry in model.state_dict().items():
                sums[name] += entry / NUM_CLIENTS
        model.load_state_dict(sums)
        with torch.no_grad():
            outputs = torch.cat([model(part) for part in images.split(500)])
        loss = float(functional.cross_entropy(outputs, labels))
        accuracy = float((outputs.argmax(dim=1) == labels).float().mean())
        say(f"round {round_number:2}   loss {loss:.4f}   test acc {accuracy:.4f}")
    return loss, accuracy, float((labels == 0).float().mean())


def _train(model: nn.Module, share: Examples, *, fault: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for _ in range(EPOCHS):
        for inputs, targets in DataLoader(share, batch_size=BATCH_SIZE, shuffle=True):
            optimizer.zero_grad()
            compute_loss(model(inputs), targets, fault=fault).backward()
            optimizer.step()


# ---- acts 2 and 3


def run_service(fault: str, size: Size, *, doctor: str) -> list[dict[str, Any]]:
    """Run the service with one bad client, and print how that goes.

    Returns:
        The run's history, as `fedserver history --json` gives it.
    """
    task = ["--task", "examples.seed_story:digits"]
    task += [] if size.data_root is None else ["--data-root", str(size.data_root.resolve())]
    with tempfile.TemporaryDirectory(prefix="seed-story-") as name:
        folder = Path(name)
        with (folder / "server.log").open("w") as log:
            server = _start(
                *("fedserver", "--port", 0, "--state-dir", folder / "server", *task),
                *("--rounds", size.num_rounds, "--min-clients", NUM_CLIENTS),
                *("--min-updates", NUM_CLIENTS - 1, "--num-partitions", size.num_shares),
                *("--epochs", EPOCHS, "--batch-size", BATCH_SIZE, "--lr", LR),
                *("--farewell", 60, "--log-level", "WARNING"),
                log=log,
            )
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        processes = [server]
        try:
            for client in range(NUM_CLIENTS):
                with (folder / f"client-{client}.log").open("w") as log:
                    processes.append(
                        _start(
                            *("fedclient", "--id", client, "--server", address, *task),
                            *("--state-dir", folder / f"client-{client}", "--doctor", doctor),
                            log=log,
                            fault=fault if client == BAD_CLIENT else "none",
                        )
                    )
            for process in processes:
                if process.wait() != 0:
                    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
                    raise RuntimeError(f"{process.args!r} failed\n{logs}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        shown = subprocess.run(
            [
                *(sys.executable, "-m", "fedserver", "history", "--json"),
                *("--state-dir", folder / "server"),
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    history: list[dict[str, Any]] = json.loads(shown.stdout)
    for entry in history:
        evaluation = entry["evaluation"] or {"loss": float("nan"), "accuracy": float("nan")}
        say(
            f"round {entry['round']:2}   loss {evaluation['loss']:.4f}   "
            f"test acc {evaluation['accuracy']:.4f}   {num_counted(entry)} updates counted"
        )
        for incident in entry["incidents"]:
            say(f"    client {incident['client']}: {_in_words(incident)}")
    return history


def _start(
    package: str, *flags: str | float | Path, log: IO[str], fault: str = "none"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", package, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {FAULT_VARIABLE: fault},
        text=True,
        stdout=subprocess.PIPE if package == "fedserver" else log,
        stderr=log,
    )


def num_counted(entry: dict[str, Any]) -> int:
    """Return how many updates a round's model rests on."""
    return sum(order["state"] == "COUNTED" for order in entry["orders"])


def _in_words(incident: dict[str, Any]) -> str:
    if "verdict" in incident:
        return str(incident["verdict"])
    names = ("step", "tensor", "loss", "reason")
    known = [f"{name} {incident[name]}" for name in names if incident.get(name) is not None]
    return ", ".join([incident["kind"], *known])


# ---- the story


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Tell the story; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fault", choices=FAULTS, default="data", help="what client 1 does wrong")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--shares", type=int, default=NUM_CLIENTS, help="into how many the digits are dealt"
    )
    parser.add_argument("--data-root", type=Path, help="MNIST in torchvision's layout; not bundled")
    args = parser.parse_args(argv)
    size = Size(num_rounds=args.rounds, num_shares=args.shares, data_root=args.data_root)
    say(f"{NUM_CLIENTS} clients; client {BAD_CLIENT} is bad: {FAULTS[args.fault]}.")

    say("\nAct 1: plain averaging, no checks")
    loss, accuracy, share = average_plainly(args.fault, size)
    say(
        f"It ends with loss: {loss:.4f}, test acc: {accuracy:.4f}, without an error or a warning. "
        f"Of the held-out digits {share:.4f} are zeros"
        + (": a model of NaN answers 0 to everything." if math.isnan(loss) else ".")
    )

    say("\nAct 2: the service, without the doctor (--doctor off)")
    checked = run_service(args.fault, size, doctor="off")[-1]["evaluation"]
    say(
        f"It ends with loss: {checked['loss']:.4f}, test acc: {checked['accuracy']:.4f}. The bad "
        "client's rounds fail by name and the model stays finite; what that client knows is lost."
    )

    say("\nAct 3: the service, as it is by default")
    cured = run_service(args.fault, size, doctor="cure")[-1]
    say(
        f"It ends with loss: {cured['evaluation']['loss']:.4f}, test acc: "
        f"{cured['evaluation']['accuracy']:.4f}, {num_counted(cured)} of {NUM_CLIENTS} clients "
        "in the last round."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A round of full MNIST beside the same training by plain processes without federation.

    python -m benchmarks.mnist_round --data-root FOLDER [--clients 10] [--rounds 4] [--write]

Both sides train the same partitions with train_model, the same batches and epochs, one process a
client, one thread each. Plain rounds run before and after the federated ones. Reach: 1.15.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from benchmarks.federation import ROOT, machine_line, started, write_section


def run_worker(index: int, num_partitions: int, data_root: Path) -> None:
    """Train one partition for each line on standard input."""
    import torch  # noqa: PLC0415

    from fedrounds.tasks.builtin import find_task  # noqa: PLC0415
    from fedrounds.tasks.loading import training_batches  # noqa: PLC0415
    from fedrounds.tasks.task import DataRequest, Partition  # noqa: PLC0415
    from fedrounds.training.loop import train_model  # noqa: PLC0415
    from fedrounds.types import TrainingConfig  # noqa: PLC0415

    torch.set_num_threads(1)
    config = TrainingConfig()
    task = find_task("mnist")
    partition = Partition(num_partitions=num_partitions, index=index, seed=0)
    examples = task.load_train(DataRequest(data_root=data_root, partition=partition))
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        loader = training_batches(task, examples, batch_size=config.batch_size, seed=number)
        train_model(
            task.build_model(),
            loader,
            epochs=config.epochs,
            lr=config.lr,
            momentum=config.momentum,
        )
        print("done", flush=True)


def plain_rounds(num_clients: int, data_root: Path, *, num_rounds: int) -> list[float]:
    """Return the seconds of rounds without federation."""
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.mnist_round", "--data-root", str(data_root)),
                *("--worker", str(index), "--clients", str(num_clients)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(num_clients)
    ]
    try:
        _expect(workers, "ready")
        took_s = []
        for _ in range(num_rounds):
            began = time.perf_counter()
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            _expect(workers, "done")
            took_s.append(time.perf_counter() - began)
        return took_s
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _expect(workers: list[subprocess.Popen[str]], word: str) -> None:
    for worker in workers:
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != word:
            raise RuntimeError(f"a worker ended before it said {word!r}")


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data_root = arguments.data_root.resolve()
    if arguments.worker is not None:
        run_worker(arguments.worker, arguments.clients, data_root)
        return
    plain_s = plain_rounds(arguments.clients, data_root, num_rounds=2)
    server_args = ["--task", "mnist", "--data-root", str(data_root)]
    server_args += ["--num-partitions", str(arguments.clients), "--require-all"]
    server_args += ["--rounds", str(arguments.rounds)]
    client_args = ["--data-root", str(data_root)]
    with started(arguments.clients, server_args, client_args=client_args) as federation:
        federation.wait()
        history = federation.history()
    plain_s += plain_rounds(arguments.clients, data_root, num_rounds=2)
    finished = [datetime.fromisoformat(entry["finished_at"]) for entry in history]
    round_s = [(after - before).total_seconds() for before, after in itertools.pairwise(finished)]
    ratio = statistics.median(round_s) / statistics.median(plain_s)
    accuracies = ", ".join(f"{entry['evaluation']['accuracy']:.4f}" for entry in history)
    text = (
        f"{machine_line()}: {arguments.clients} clients, 2 epochs: a round takes "
        f"{statistics.median(round_s):.1f} s (median of {len(round_s)}), the same training by "
        f"plain processes {statistics.median(plain_s):.1f} s (median of {len(plain_s)}): "
        f"ratio {ratio:.2f}. Accuracies: {accuracies}."
    )
    print(text)
    if arguments.write:
        write_section("mnist_round", text)


if __name__ == "__main__":
    main()

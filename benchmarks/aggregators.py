"""Aggregators over many large updates: time and memory, beside reading the same bytes once.

    python -m benchmarks.aggregators [--updates 200] [--model-mb 100] [--strategies median,krum]
                                     [--folder FOLDER] [--write]

Every update is a file of its own with numbers of its own (a common model plus noise), in FOLDER,
which takes updates * model-mb of the disk and is removed at the end. Each strategy runs in a new
process and writes the next model, as the server does. Memory is the process's resident peak; idle
is what it has before the first byte is read (torch, most of it). Reading is one process that reads
every file from begin to end in pieces of 1 MiB. Reach: idle + 3 models + 64 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.federation import machine_line, peak_memory_mb, write_section
from fedrounds.memory import keep_one_heap
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tensors.codec import read_layout, write_state
from fedrounds.types import EntryKind
from fedserver.models.checkpoints import Checkpoints

MB = 1_000_000
_PIECE_BYTES = 1 << 20
_NUM_TENSORS = 4
# Odd, so that no two updates have the same number in the same position.
_SHIFT = 997
_SEED = 1


def main() -> None:
    """Write the updates, measure every strategy, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--model-mb", type=int, default=100)
    parser.add_argument("--strategies", default="fedavg,median,krum,geometric-median")
    parser.add_argument("--f", type=int, default=20, help="bad updates that krum is to bear")
    parser.add_argument("--folder", type=Path, default=None, help="where the updates go")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measure(arguments.measure, arguments.folder, f=arguments.f)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _write_updates(folder, num_updates=arguments.updates, model_bytes=arguments.model_mb * MB)
        rows = []
        for strategy in ("read", *arguments.strategies.split(",")):
            measured = _in_new_process(strategy, folder, f=arguments.f)
            rows.append((strategy, measured))
            print(strategy, measured, file=sys.stderr)
    text = "\n".join(_table(arguments, rows))
    print(text)
    if arguments.write:
        write_section("aggregators", text)


def _write_updates(folder: Path, *, num_updates: int, model_bytes: int) -> None:
    size = model_bytes // 4 // _NUM_TENSORS
    generator = torch.Generator().manual_seed(_SEED)
    base = {
        f"{index}.weight": torch.randn(size, generator=generator) for index in range(_NUM_TENSORS)
    }
    pool = 0.01 * torch.randn(size + _SHIFT * _NUM_TENSORS * num_updates, generator=generator)
    write_state(folder / "base", base)
    for number in track(range(num_updates), description="writing the updates"):
        begins = (_SHIFT * (number * _NUM_TENSORS + index) for index in range(_NUM_TENSORS))
        update = {
            name: values + pool[begin : begin + size]
            for (name, values), begin in zip(base.items(), begins, strict=True)
        }
        write_state(folder / f"update-{number:04}", update)


def _in_new_process(strategy: str, folder: Path, *, f: int) -> dict[str, float]:
    command = ["--measure", strategy, "--folder", str(folder), "--f", str(f)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aggregators", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(strategy: str, folder: Path, *, f: int) -> dict[str, float]:
    """Return the seconds, the peak and the idle memory in MB of one pass."""
    keep_one_heap()
    torch.set_num_threads(1)
    idle_mb = peak_memory_mb(os.getpid())
    begin = time.perf_counter()
    if strategy == "read":
        _read_all(folder)
    else:
        _aggregate(strategy, folder, f=f)
    return {
        "seconds": time.perf_counter() - begin,
        "idle_mb": idle_mb,
        "peak_mb": peak_memory_mb(os.getpid()),
    }


def _read_all(folder: Path) -> None:
    buffer = bytearray(_PIECE_BYTES)
    for path in sorted(folder.glob("update-*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _aggregate(strategy: str, folder: Path, *, f: int) -> None:
    base = StateFile(path=folder / "base", layout=read_layout(folder / "base"))
    kinds = dict.fromkeys(base.layout.entries, EntryKind.PARAMETER)
    updates = [
        StateFile(path=path, layout=read_layout(path), num_examples=10)
        for path in sorted(folder.glob("update-*"))
    ]
    cohort = Cohort(base=base, updates=updates, kinds=kinds)
    parameters = {"f": f} if {"krum", "multi-krum", "bulyan"} & set(strategy.split("+")) else {}
    resolved = find_strategy(strategy, parameters)
    Checkpoints(folder / "models", kinds).save(
        base, next_blocks(resolved, cohort), state_layout=state_layout(resolved, cohort)
    )


def _table(arguments: argparse.Namespace, rows: list[tuple[str, dict[str, float]]]) -> list[str]:
    command = (
        f"--updates {arguments.updates} --model-mb {arguments.model_mb} "
        f"--strategies {arguments.strategies}"
    )
    reading_s = rows[0][1]["seconds"]
    lines = [
        f"{machine_line()}; `python -m benchmarks.aggregators {command}`: "
        f"{arguments.updates} updates of {arguments.model_mb} MB, f = {arguments.f}",
        "",
        "| strategy | time (s) | times reading | idle -> peak (MB) | peak - idle in models |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strategy, measured in rows:
        grown_mb = measured["peak_mb"] - measured["idle_mb"]
        lines.append(
            f"| {'reading alone' if strategy == 'read' else strategy} "
            f"| {measured['seconds']:.1f} | {measured['seconds'] / reading_s:.2f} "
            f"| {measured['idle_mb']:.0f} -> {measured['peak_mb']:.0f} "
            f"| {grown_mb / arguments.model_mb:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()

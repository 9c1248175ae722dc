"""What a round costs beside training: seconds, bytes on the wire, memory, against raw gRPC.

    python -m benchmarks.round_overhead [--cases 25x10,100x10] [--write]
                                        [--peer flwr --peer-python PATH [--peer-cases 25x10]]

A case is MEGABYTESxCLIENTS; every client is a process and gives back the model with every tensor
changed. Rounds of the service and of raw gRPC (the same bytes, written and fdatasync'd) take turns
in blocks; of either the median counts, after warm-up rounds. Beside the seconds stand those of the
processors, of all processes together: they tell more where others use the machine too. `--write`
puts the table into docs/performance.md, where rows of other cases stay: a case can be measured by
itself. With `--peer flwr` some of the cases run on Flower too, after ours, in the environment that
PATH is the Python of.
"""

import argparse
import functools
import itertools
import statistics
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
import psutil

from benchmarks import flower_peer
from benchmarks.federation import (
    Federation,
    anonymous_memory_mb,
    machine_line,
    processor_s,
    read_section,
    started,
    write_section,
)
from benchmarks.raw_stream import raw_rounds

CASES = "1x2,1x10,25x2,25x10,100x2,100x10,400x2,1x50,25x50"
_COMMAND = "`python -m benchmarks.round_overhead`"
_NUM_WARM_UP = 3
_NUM_MEASURED = 7
_SAMPLE_S = 0.01


@dataclass(frozen=True)
class Measured:
    """One case; anonymous memory in MB, idle with a model of 4 KB.

    Processor seconds are those of all processes together in a round.
    """

    megabytes: float
    num_clients: int
    round_s: float
    raw_s: float
    processor_s: float
    raw_processor_s: float
    wire_ratio: float
    server_idle_mb: float
    server_peak_mb: float
    client_idle_mb: float
    client_peak_mb: float


class Usage:
    """Samples what a federation's processes use, as a context manager, from start to end of it.

    `server_mb` and `client_mb` are the most memory of their own that the server and the first
    client held.
    """

    def __init__(self, federation: Federation) -> None:
        self.server_mb = self.client_mb = 0.0
        self._server = federation.server.pid
        clients = [client.pid for client in federation.clients if client.pid is not None]
        self._client = clients[0]
        self._pids = [self._server, *clients]
        self._times: list[float] = []
        self._processor_s: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def processor_s(self, times: list[float]) -> list[float]:
        """Return the processor seconds of all processes together up to each of these times."""
        used_s = np.interp(times, self._times, self._processor_s)
        return [float(seconds) for seconds in used_s]

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            try:
                self.server_mb = max(self.server_mb, anonymous_memory_mb(self._server))
                self.client_mb = max(self.client_mb, anonymous_memory_mb(self._client))
                used = sum(processor_s(pid) for pid in self._pids)
            except OSError:
                return  # the first of them has ended: the last round is over
            self._times.append(time.time())
            self._processor_s.append(used)


def measure(megabytes: float, num_clients: int) -> Measured:
    """Run one case."""
    server_idle_mb, client_idle_mb = _idle_mb()
    num_bytes = int(megabytes * 1e6)
    num_rounds = _NUM_WARM_UP + _NUM_MEASURED + 1
    task = ["--task", "benchmarks.tasks:changed"]
    server_args = [*task, "--rounds", str(num_rounds), "--epochs", "1", "--require-all"]
    server_args += ["--num-partitions", str(num_clients)]
    with raw_rounds(num_clients, num_bytes) as raw:
        raw_took = [raw.run_round() for _ in range(_NUM_WARM_UP + _NUM_MEASURED)][_NUM_WARM_UP:]
        wire_before = _loopback_bytes()
        with started(
            num_clients, server_args, client_args=task, FED_BENCH_MB=str(megabytes)
        ) as federation:
            with Usage(federation) as usage:
                federation.wait()
            wire_bytes = _loopback_bytes() - wire_before
            history = federation.history()
        raw_took += [raw.run_round() for _ in range(_NUM_MEASURED)]
    finished = [datetime.fromisoformat(entry["finished_at"]).timestamp() for entry in history]
    used = usage.processor_s(finished)
    return Measured(
        megabytes=megabytes,
        num_clients=num_clients,
        round_s=_median_step(finished[_NUM_WARM_UP:]),
        raw_s=statistics.median(raw_round.round_s for raw_round in raw_took),
        processor_s=_median_step(used[_NUM_WARM_UP:]),
        raw_processor_s=statistics.median(raw_round.processor_s for raw_round in raw_took),
        wire_ratio=wire_bytes / (2 * num_bytes * num_clients * num_rounds),
        server_idle_mb=server_idle_mb,
        server_peak_mb=usage.server_mb,
        client_idle_mb=client_idle_mb,
        client_peak_mb=usage.client_mb,
    )


@functools.cache
def _idle_mb() -> tuple[float, float]:
    """Return the peak memory of server and client in a run with a model of 4 KB."""
    task = ["--task", "benchmarks.tasks:changed"]
    with (
        started(2, [*task, "--rounds", "3"], client_args=task) as federation,
        Usage(federation) as usage,
    ):
        federation.wait()
    return usage.server_mb, usage.client_mb


def _median_step(values: list[float]) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(values))


def _loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def table(measured: Measured) -> str:
    """Return a case as a Markdown table with one row."""
    server_models = (measured.server_peak_mb - measured.server_idle_mb) / measured.megabytes
    client_models = (measured.client_peak_mb - measured.client_idle_mb) / measured.megabytes
    return _table(
        {
            "model x clients": f"{measured.megabytes:g} MB x {measured.num_clients}",
            "round (s)": f"{measured.round_s:.3f}",
            "raw (s)": f"{measured.raw_s:.3f}",
            "ratio": f"{measured.round_s / measured.raw_s:.2f}",
            "processor (s)": f"{measured.processor_s:.3f}",
            "raw processor (s)": f"{measured.raw_processor_s:.3f}",
            "ratio of these": f"{measured.processor_s / measured.raw_processor_s:.2f}",
            "wire / ideal": f"{measured.wire_ratio:.4f}",
            "server idle -> peak (MB)": (
                f"{measured.server_idle_mb:.0f} -> {measured.server_peak_mb:.0f}"
            ),
            "in models": f"{server_models:.1f}",
            "client idle -> peak (MB)": (
                f"{measured.client_idle_mb:.0f} -> {measured.client_peak_mb:.0f}"
            ),
            "in models ": f"{client_models:.1f}",
        }
    )


def peer_table(measured: Measured, peer: flower_peer.PeerMeasured) -> str:
    """Return a case beside the same on Flower as a Markdown table with one row."""
    return _table(
        {
            "model x clients": f"{measured.megabytes:g} MB x {measured.num_clients}",
            "round (s)": f"{measured.round_s:.3f}",
            "Flower (s)": f"{peer.round_s:.3f}",
            "Flower / ours": f"{peer.round_s / measured.round_s:.1f}",
            "server peak (MB)": f"{measured.server_peak_mb:.0f}",
            "Flower's (MB)": f"{peer.server_peak_mb:.0f}",
        }
    )


def _table(row: dict[str, str]) -> str:
    row["measured (UTC)"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    lines = [list(row), ["---"] * len(row), list(row.values())]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def joined(earlier: str, new: str) -> str:
    """Return a table with the rows of an earlier table, by size, but for those measured again."""
    kept, lines = (
        [line for line in text.splitlines() if line[:1] == "|"] for text in (earlier, new)
    )
    if kept[:1] != lines[:1]:
        return new
    rows = {line.split("|")[1]: line for line in (*kept[2:], *lines[2:])}

    def size(case: str) -> tuple[float, int]:
        megabytes, num_clients = case.split(" MB x ")
        return float(megabytes), int(num_clients)

    return "\n".join([*lines[:2], *(rows[case] for case in sorted(rows, key=size))])


def main() -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peer", choices=["flwr"])
    parser.add_argument("--peer-python", type=Path, metavar="PATH")
    parser.add_argument("--peer-cases", default="25x10")
    parser.add_argument("--peer-rounds", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    flower = None
    if arguments.peer:
        if arguments.peer_python is None:
            parser.error("--peer needs --peer-python, the Python of Flower's environment")
        try:
            flower = flower_peer.find_peer(arguments.peer_python)
        except RuntimeError as error:
            parser.error(str(error))
    lines: list[str] = []
    for case in arguments.cases.split(","):
        megabytes, num_clients = case.split("x")
        size = (float(megabytes), int(num_clients))
        measured = measure(*size)
        lines = _show(lines, "round_overhead", table(measured), _COMMAND, write=arguments.write)
        if flower is not None and case in arguments.peer_cases.split(","):
            peer = flower_peer.measure(flower, *size, arguments.peer_rounds)
            made_by = f"{_COMMAND} with `--peer flwr` ({flower.version})"
            name = "round_overhead_flwr"
            _show([], name, peer_table(measured, peer), made_by, write=arguments.write)


def _show(lines: list[str], section: str, new: str, made_by: str, *, write: bool) -> list[str]:
    """Print a table's row, its head only where there are no `lines` yet; returns all lines."""
    printed = new.splitlines()[2 if lines else 0 :]
    print("\n".join(printed), flush=True)
    if write:
        rows = joined(read_section(section), new)
        write_section(section, f"{machine_line()}; {made_by}\n\n{rows}\n")
    return [*lines, *printed]


if __name__ == "__main__":
    main()

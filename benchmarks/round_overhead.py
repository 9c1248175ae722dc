"""What a round costs beside training: seconds, bytes on the wire, memory, against raw gRPC.

    python -m benchmarks.round_overhead [--cases 25x10,100x10] [--write]
                                        [--peer flwr --peer-python PATH [--peer-rounds 3]]

A case is MEGABYTESxCLIENTS; every client is a process and gives back the model with every tensor
changed. Rounds of the service and of raw gRPC (the same bytes, written and fdatasync'd) take turns
in blocks; of either the median counts, after warm-up rounds. `--write` puts the table into
docs/performance.md, where rows of other cases stay: a case can be measured by itself. With
`--peer flwr` the same rounds run on Flower too, after ours, in the environment that PATH is the
Python of.
"""

import argparse
import functools
import itertools
import statistics
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks import flower_peer
from benchmarks.federation import (
    anonymous_memory_mb,
    machine_line,
    read_section,
    started,
    write_section,
)
from benchmarks.raw_stream import raw_rounds

CASES = "1x2,1x10,25x2,25x10,100x2,100x10,400x2,1x50,25x50"
_NUM_WARM_UP = 3
_NUM_MEASURED = 7
_SAMPLE_S = 0.01


@dataclass(frozen=True)
class Measured:
    """One case; anonymous memory in MB, idle with a model of 4 KB."""

    megabytes: float
    num_clients: int
    round_s: float
    raw_s: float
    wire_ratio: float
    server_idle_mb: float
    server_peak_mb: float
    client_idle_mb: float
    client_peak_mb: float


class PeakMemory:
    """Samples the most memory of its own that a process holds while it lives."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            try:
                self.peak_mb = max(self.peak_mb, anonymous_memory_mb(self._pid))
            except OSError:
                return


def measure(megabytes: float, num_clients: int) -> Measured:
    """Run one case."""
    server_idle_mb, client_idle_mb = _idle_mb()
    num_bytes = int(megabytes * 1e6)
    num_rounds = _NUM_WARM_UP + _NUM_MEASURED + 1
    task = ["--task", "benchmarks.tasks:changed"]
    server_args = [*task, "--rounds", str(num_rounds), "--epochs", "1", "--require-all"]
    server_args += ["--num-partitions", str(num_clients)]
    with raw_rounds(num_clients, num_bytes) as raw:
        raw_s = [raw.run_round() for _ in range(_NUM_WARM_UP + _NUM_MEASURED)][_NUM_WARM_UP:]
        wire_before = _loopback_bytes()
        with started(
            num_clients, server_args, client_args=task, FED_BENCH_MB=str(megabytes)
        ) as federation:
            server = PeakMemory(federation.server.pid)
            client = PeakMemory(federation.clients[0].pid)
            federation.wait()
            server.stop()
            client.stop()
            wire_bytes = _loopback_bytes() - wire_before
            history = federation.history()
        raw_s += [raw.run_round() for _ in range(_NUM_MEASURED)]
    finished = [datetime.fromisoformat(entry["finished_at"]) for entry in history]
    took_s = [(after - before).total_seconds() for before, after in itertools.pairwise(finished)]
    return Measured(
        megabytes=megabytes,
        num_clients=num_clients,
        round_s=statistics.median(took_s[_NUM_WARM_UP:]),
        raw_s=statistics.median(raw_s),
        wire_ratio=wire_bytes / (2 * num_bytes * num_clients * num_rounds),
        server_idle_mb=server_idle_mb,
        server_peak_mb=server.peak_mb,
        client_idle_mb=client_idle_mb,
        client_peak_mb=client.peak_mb,
    )


@functools.cache
def _idle_mb() -> tuple[float, float]:
    """Return the peak memory of server and client in a run with a model of 4 KB."""
    task = ["--task", "benchmarks.tasks:changed"]
    with started(2, [*task, "--rounds", "3"], client_args=task) as federation:
        server = PeakMemory(federation.server.pid)
        client = PeakMemory(federation.clients[0].pid)
        federation.wait()
        server.stop()
        client.stop()
    return server.peak_mb, client.peak_mb


def _loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def table(measured: list[Measured], peer: list[flower_peer.PeerMeasured]) -> str:
    """Return the results as a Markdown table, with three more columns if a peer was measured."""
    lines = [
        "| model x clients | round (s) | raw (s) | ratio | wire / ideal "
        "| server idle -> peak (MB) | in models | client idle -> peak (MB) | in models |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in measured:
        server_models = (one.server_peak_mb - one.server_idle_mb) / one.megabytes
        client_models = (one.client_peak_mb - one.client_idle_mb) / one.megabytes
        lines.append(
            f"| {one.megabytes:g} MB x {one.num_clients} | {one.round_s:.3f} | {one.raw_s:.3f} "
            f"| {one.round_s / one.raw_s:.2f} | {one.wire_ratio:.4f} "
            f"| {one.server_idle_mb:.0f} -> {one.server_peak_mb:.0f} | {server_models:.1f} "
            f"| {one.client_idle_mb:.0f} -> {one.client_peak_mb:.0f} | {client_models:.1f} |"
        )
    if peer:
        lines[0] += " Flower (s) | Flower / ours | Flower server peak (MB) |"
        lines[1] += " --- | --- | --- |"
        for at, (one, other) in enumerate(zip(measured, peer, strict=True), start=2):
            lines[at] += (
                f" {other.round_s:.3f} | {other.round_s / one.round_s:.1f} "
                f"| {other.server_peak_mb:.0f} |"
            )
    lines[0] += " measured (UTC) |"
    lines[1] += " --- |"
    lines[2:] = [f"{line} {datetime.now(UTC):%Y-%m-%d %H:%M} |" for line in lines[2:]]
    return "\n".join(lines)


def joined(earlier: str, new: str) -> str:
    """Return a table with the rows of an earlier one, by size, but for those measured again."""
    kept, lines = ([one for one in text.splitlines() if one[:1] == "|"] for text in (earlier, new))
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
    parser.add_argument("--section", default="round_overhead", help="of docs/performance.md")
    parser.add_argument("--peer", choices=["flwr"])
    parser.add_argument("--peer-python", type=Path, metavar="PATH")
    parser.add_argument("--peer-rounds", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    flower = None
    made_by = "`python -m benchmarks.round_overhead`"
    if arguments.peer:
        if arguments.peer_python is None:
            parser.error("--peer needs --peer-python, the Python of Flower's environment")
        try:
            flower = flower_peer.find_peer(arguments.peer_python)
        except RuntimeError as error:
            parser.error(str(error))
        made_by += f" with `--peer flwr` ({flower.version})"
    measured: list[Measured] = []
    peer: list[flower_peer.PeerMeasured] = []
    for case in arguments.cases.split(","):
        megabytes, num_clients = case.split("x")
        size = (float(megabytes), int(num_clients))
        measured.append(measure(*size))
        if flower is not None:
            peer.append(flower_peer.measure(flower, *size, arguments.peer_rounds))
        newest = table(measured[-1:], peer[-1:])
        print(newest.splitlines()[-1], flush=True)
        if arguments.write:
            rows = joined(read_section(arguments.section), newest)
            write_section(arguments.section, f"{machine_line()}; {made_by}\n\n{rows}\n")
    print(table(measured, peer))


if __name__ == "__main__":
    main()

"""What a round costs beside training: seconds, bytes on the wire, memory, against raw gRPC.

    python -m benchmarks.round_overhead [--cases 25x10,100x10] [--write]

A case is MEGABYTESxCLIENTS; every client is a process and gives back the model with every tensor
changed. Rounds of the service and of raw gRPC (the same bytes, written and fdatasync'd) take turns
in blocks; of either the median counts, after warm-up rounds. `--write` puts the table into
docs/performance.md.
"""

import argparse
import functools
import itertools
import statistics
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.federation import machine_line, started, write_section
from benchmarks.raw_stream import raw_rounds

CASES = "1x2,1x10,25x2,25x10,100x2,100x10,400x2,1x50,25x50"
_NUM_WARM_UP = 3
_NUM_MEASURED = 7


@dataclass(frozen=True)
class Measured:
    """One case; memory in MB, peaks over idle in models."""

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
    """Samples the largest resident memory of a process while it lives."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.peak_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        # The kernel's own high-water mark, so that nothing falls between two samples.
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(0.05):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("VmHWM:"):
                    self.peak_mb = max(self.peak_mb, int(line.split()[1]) * 1024 / 1e6)


def measure(megabytes: float, num_clients: int) -> Measured:
    """Run one case."""
    server_idle_mb, client_idle_mb = _idle_mb()
    num_bytes = int(megabytes * 1e6)
    num_rounds = _NUM_WARM_UP + _NUM_MEASURED + 1
    task = ["--task", "benchmarks.tasks:changed"]
    server_args = [*task, "--rounds", str(num_rounds), "--epochs", "1", "--require-all"]
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


def table(measured: list[Measured]) -> str:
    """Return the results as Markdown."""
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
    return "\n".join(lines)


def main() -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    measured = []
    for case in arguments.cases.split(","):
        megabytes, num_clients = case.split("x")
        measured.append(measure(float(megabytes), int(num_clients)))
        print(table(measured[-1:]).splitlines()[-1], flush=True)
    text = (
        f"{machine_line()}; `python -m benchmarks.round_overhead --cases {arguments.cases}`\n\n"
        f"{table(measured)}\n"
    )
    print(text)
    if arguments.write:
        write_section("round_overhead", text)


if __name__ == "__main__":
    main()

"""How long clients wait between two rounds: from 'round closed' to 'order handed out'.

    python -m benchmarks.handover [--rounds 100] [--clients 2]

Both moments are the server's own, from its history. Reach: 20 ms.
"""

import argparse
import itertools
import statistics
from datetime import datetime

from benchmarks.federation import machine_line, started, write_section


def main() -> None:
    """Run the rounds and print median, 95th percentile and worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    task = ["--task", "benchmarks.tasks:changed"]
    server_args = [*task, "--rounds", str(arguments.rounds + 1)]
    with started(arguments.clients, server_args, client_args=task) as federation:
        federation.wait()
        history = federation.history()
    waits_ms = []
    for before, after in itertools.pairwise(history):
        closed_at = datetime.fromisoformat(before["closed_at"])
        waits_ms += [
            (datetime.fromisoformat(order["handed_out_at"]) - closed_at).total_seconds() * 1e3
            for order in after["orders"]
        ]
    percentiles = statistics.quantiles(waits_ms, n=20)
    rounds_ms = [
        (
            datetime.fromisoformat(entry["finished_at"])
            - datetime.fromisoformat(entry["started_at"])
        ).total_seconds()
        * 1e3
        for entry in history[1:]
    ]
    text = (
        f"{machine_line()}: {len(waits_ms)} orders in {arguments.rounds} rounds of "
        f"{arguments.clients} clients: median {statistics.median(waits_ms):.1f} ms, "
        f"95th percentile {percentiles[-1]:.1f} ms, worst {max(waits_ms):.1f} ms; "
        f"a whole round {statistics.median(rounds_ms):.1f} ms."
    )
    print(text)
    if arguments.write:
        write_section("handover", text)


if __name__ == "__main__":
    main()

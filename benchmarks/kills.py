"""Kill -9 at random moments of one long run, on either side: `python -m benchmarks.kills --write`.

A small task with --require-all, three clients, rounds of about a second. Each kill is proven from
the history to have landed within a round, the same command is started again, and sometimes the next
kill comes before the last one has healed. In the end every model must be that of the same run
without a kill. The seed decides who is killed and after how long; what the killed process was doing
then is chance.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.federation import machine_line, write_section
from tests.acceptance.faults.aftermath import (
    acknowledged,
    count_lost,
    count_twice,
    expect_same_models,
    expect_verified,
    now,
    recovery_s,
)
from tests.acceptance.federation import expect_clean_exits, start_client, start_server
from tests.processes import Process, Scene, Server, fixed_port

CLIENTS = (0, 1, 2)
ROUNDS_A_KILL = 2
"""More than pass between two kills on average, so that the run doesn't end before the last one: the
one that waits for who was killed, and 0.8 in the pause after it."""
STEP_S = "0.1"
"""A round takes 8 to 12 steps of this on each client."""
LONGEST_WAIT_S = 2.0
IMPATIENT = 0.25
"""How often a kill comes without waiting until the last one has healed."""


@dataclass(frozen=True)
class Kill:
    """One kill -9 that landed within a round."""

    who: int | None
    """A client, or None for the server."""
    at: datetime
    where: str


@dataclass(frozen=True)
class Size:
    """What a federation takes at a moment."""

    server_bytes: int
    client_bytes: int
    disk_bytes: int
    num_files: int

    def __str__(self) -> str:
        return (
            f"server {self.server_bytes / 1e6:.0f} MB and largest client "
            f"{self.client_bytes / 1e6:.0f} MB of memory, {self.disk_bytes / 1e6:.2f} MB in "
            f"{self.num_files} files on the disk"
        )


class Federation:
    """One server and three clients that can be killed and started again."""

    def __init__(self, scene: Scene, *, num_rounds: int, step_s: str) -> None:
        self._scene = scene
        self._step_s = step_s
        self._flags: list[str | int] = [
            *("--port", fixed_port(), "--rounds", num_rounds, "--min-clients", len(CLIENTS)),
            # On a busy machine a client may hear late that the run is over.
            *("--require-all", "--seed", 5, "--farewell", 120),
        ]
        self.server: Server = start_server(scene, *self._flags)
        self.clients = {client_id: self._start_client(client_id) for client_id in CLIENTS}

    def start(self, who: int | None) -> None:
        """Start one side again with the same command."""
        if who is None:
            self.server = start_server(self._scene, *self._flags)
        else:
            self.clients[who] = self._start_client(who)

    def wait_until_healed(self, who: int | None) -> None:
        """Return once the process that was started again has got something done."""
        if who is None:
            self.server.wait_for_line("update-stored|round-")
        else:
            self.clients[who].wait_for_line("update (stored|duplicate)")

    def kill(self, who: int | None) -> Kill | None:
        """Kill one side; None if it landed outside a round."""
        (self.server if who is None else self.clients[who]).kill()
        at = now()
        last = self._scene.history()[-1]
        is_within = last["phase"] in ("COLLECTING", "AGGREGATING")
        if not is_within or datetime.fromisoformat(last["started_at"]) > at:
            return None
        states = ",".join(order["state"] for order in last["orders"])
        return Kill(who, at, f"round {last['round']} {last['phase']} {states}")

    def size(self) -> Size:
        """Measure what everything takes now."""
        blocks = []
        for path in self._scene.folder.rglob("*"):
            with suppress(FileNotFoundError):  # gone since it was listed
                blocks += [path.stat().st_blocks] if path.is_file() else []
        return Size(
            server_bytes=self.server.rss_bytes(),
            client_bytes=max(client.rss_bytes() for client in self.clients.values()),
            disk_bytes=512 * sum(blocks),
            num_files=len(blocks),
        )

    def end(self, num_rounds: int) -> tuple[Size, list[dict[str, Any]]]:
        """Wait for the run's end; returns what it took in its last round, and its history."""
        self.server.wait_for_line(f"round-opened round={num_rounds} ", timeout_s=3600)
        size = self.size()
        expect_clean_exits(self.server, *self.clients.values())
        expect_verified(self._scene)
        return size, self._scene.history()

    def _start_client(self, client_id: int) -> Process:
        return start_client(self._scene, client_id, self.server.address, TINY_STEP_S=self._step_s)


@contextmanager
def opened_scene() -> Iterator[Scene]:
    """Give a folder to start processes in; what they said is shown if something fails."""
    with tempfile.TemporaryDirectory(prefix="fed-kills-") as name:
        scene = Scene(Path(name))
        try:
            yield scene
        except BaseException:
            print(scene.logs())
            raise
        finally:
            scene.close()


def strike(federation: Federation, *, num_kills: int, rng: random.Random) -> list[Kill]:
    """Kill so many times at random moments."""
    kills: list[Kill] = []
    who: int | None = None
    while len(kills) < num_kills:
        if rng.random() >= IMPATIENT:
            federation.wait_until_healed(who)
        # Not a wait for anything: the kill is to land anywhere.
        time.sleep(rng.uniform(0, LONGEST_WAIT_S))
        who = rng.choice([None, rng.choice(CLIENTS)])
        landed = federation.kill(who)
        federation.start(who)
        if landed is not None:
            kills.append(landed)
            name = "server" if who is None else f"client {who}"
            print(f"{len(kills)}: {name} in {landed.where}", flush=True)
    federation.wait_until_healed(who)
    return kills


def measure(*, num_kills: int, seed: int) -> str:
    """Return the report of a run with so many kills.

    Raises:
        AssertionError: a kill changed a model, lost an update or made one count twice.
    """
    num_rounds = ROUNDS_A_KILL * num_kills
    with opened_scene() as scene:
        calm_size, expected = Federation(scene, num_rounds=num_rounds, step_s="0").end(num_rounds)
    with opened_scene() as scene:
        federation = Federation(scene, num_rounds=num_rounds, step_s=STEP_S)
        federation.server.wait_for_line("round-opened round=3 ")
        before = federation.size()
        kills = strike(federation, num_kills=num_kills, rng=random.Random(f"kills {seed}"))
        after, history = federation.end(num_rounds)
        receipts = acknowledged(scene, history)
    expect_same_models(history, expected)
    assert len(history) == num_rounds
    lost, twice = count_lost(history, receipts), count_twice(history)
    assert (lost, twice) == (0, 0), f"{lost} updates lost, {twice} counted twice"
    recoveries_s = [recovery_s(history, since=kill.at, client_id=kill.who) for kill in kills]
    times_s = [time_s for time_s in recoveries_s if time_s is not None]
    assert len(times_s) == num_kills
    num_server = sum(kill.who is None for kill in kills)
    return "\n".join(
        (
            f"{machine_line()}: `python -m benchmarks.kills --kills {num_kills} --seed {seed}`",
            "",
            f"- {num_kills} kills, each within a round: {num_server} of the server, "
            f"{num_kills - num_server} of a client; {num_rounds} rounds, every model that of a run "
            f"without kills (the last is {history[-1]['model_digest'][:16]}); updates lost {lost}, "
            f"counted twice {twice}",
            "- time to recover, from the kill to the next progress (for a client: its next "
            f"update), starting the process included: median {statistics.median(times_s):.2f} s, "
            f"worst {max(times_s):.2f} s",
            f"- in round 3, before the first kill: {before}",
            f"- in the last round: {after}",
            f"- in the last round of the run without kills: {calm_size}",
        )
    )


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the result into docs/faults.md")
    args = parser.parse_args()
    text = measure(num_kills=args.kills, seed=args.seed)
    print(text)
    if args.write:
        write_section("kills", text, page="faults.md")


if __name__ == "__main__":
    main()

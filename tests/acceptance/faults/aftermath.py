"""What is examined after a fault, and the row of docs/faults.md that it gives."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.processes import Scene

History = list[dict[str, Any]]

REPORT_VARIABLE = "FED_FAULTS_REPORT"
"""Names the file that every fault's row is added to, one JSON object a line."""


def now() -> datetime:
    """Return the time as the history has it."""
    return datetime.now(UTC)


def acknowledged(scene: Scene, history: History) -> set[str]:
    """Return the orders of this run whose receipt a client has said it holds."""
    run_id = history[0]["orders"][0]["order_id"].partition("-r")[0]
    return {
        match[1]
        for process in scene.processes
        for line in process.lines
        if (match := re.search(rf"order ({run_id}-\S+): update (?:stored|duplicate)", line))
    }


def count_lost(history: History, receipts: Collection[str]) -> int:
    """Return how many acknowledged updates no model rests on."""
    counted = {
        order["order_id"]
        for entry in history
        for order in entry["orders"]
        if order["state"] == "COUNTED" and entry["model_digest"] is not None
    }
    return len(set(receipts) - counted)


def count_twice(history: History, *, is_asynchronous: bool = False) -> int:
    """Return how many updates count more often than once: by order, and by round and client.

    In an asynchronous run a fast client may fill a buffer by itself, each time with another order.
    """
    orders: Counter[str] = Counter()
    clients: Counter[tuple[int, int]] = Counter()
    for entry in history:
        for order in entry["orders"]:
            # What was counted in a model that was taken back may count in its replacement.
            if order["state"] == "COUNTED" and entry["phase"] != "ROLLED_BACK":
                orders[order["order_id"]] += 1
                clients[entry["round"], order["client"]] += 1
    judged = (orders,) if is_asynchronous else (orders, clients)
    return max(sum(count - 1 for count in counts.values()) for counts in judged)


def recovery_s(history: History, *, since: datetime, client_id: int | None = None) -> float | None:
    """Return the time from `since` to the next progress: of the run, or of one client's updates.

    Progress is an update recorded and, of the run, a round opened, closed or done. None: there was
    no more of it.
    """
    moments = [
        update["received_at"]
        for entry in history
        for update in entry["updates"]
        if client_id in (None, update["client"])
    ]
    if client_id is None:
        for entry in history:
            moments += [entry["started_at"], entry["closed_at"], entry["finished_at"]]
    later = [
        (datetime.fromisoformat(moment) - since).total_seconds()
        for moment in moments
        if moment is not None
    ]
    return min((duration_s for duration_s in later if duration_s > 0), default=None)


def digests(history: History) -> list[tuple[int, str | None]]:
    """Return (round, digest) of every model."""
    return [
        (entry["round"], entry["model_digest"]) for entry in history if entry["phase"] == "DONE"
    ]


def expect_verified(scene: Scene, *, state: str = "server") -> None:
    """Let the service examine everything that the run has left on the disk."""
    done = scene.command("verify", "--state-dir", scene.folder / state)
    assert done.returncode == 0, done.stdout + done.stderr


def expect_same_models(history: History, expected: History) -> None:
    """Compare a run of `--require-all` with the undisturbed one, which may have more rounds.

    Every round needed one attempt and counts all of its cohort, and all models are the same bytes.
    """
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (number, 1, "DONE") for number in range(1, len(history) + 1)
    ]
    assert {order["state"] for entry in history for order in entry["orders"]} == {"COUNTED"}
    assert digests(history) == digests(expected)[: len(history)]


def conclude(
    scene: Scene,
    *,
    fault: str,
    struck_at: datetime | None,
    seen: Sequence[str] = (),
    client_id: int | None = None,
    state: str = "server",
    is_asynchronous: bool = False,
) -> None:
    """Examine a run that has ended after a fault, and add its row to the report.

    Args:
        scene: where everything ran.
        fault: what was done, for the report.
        struck_at: when the fault struck, or ended if it was one that lasts.
        seen: what happened, as the test saw it; the history's incidents are added.
        client_id: whose updates show that the run has recovered; anybody's if None.
        state: the server's folder.
        is_asynchronous: whether a round is a full buffer.
    """
    expect_verified(scene, state=state)
    history = scene.history(state=state)
    kinds = Counter(incident["kind"] for entry in history for incident in entry["incidents"])
    lost = count_lost(history, acknowledged(scene, history))
    twice = count_twice(history, is_asynchronous=is_asynchronous)
    row = {
        "fault": fault,
        "happened": [*seen, *(f"{kind} x{count}" for kind, count in sorted(kinds.items()))],
        "recovery_s": struck_at and recovery_s(history, since=struck_at, client_id=client_id),
        "counted": sum(
            order["state"] == "COUNTED" for entry in history for order in entry["orders"]
        ),
        "lost": lost,
        "twice": twice,
    }
    if REPORT_VARIABLE in os.environ:
        with Path(os.environ[REPORT_VARIABLE]).open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert (lost, twice) == (0, 0), row

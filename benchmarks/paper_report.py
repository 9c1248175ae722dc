"""docs/results.md from the results that benchmarks.papers keeps."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.federation import write_section
from benchmarks.paper_rows import ROWS, Row

RESULTS = Path(__file__).with_name("results")
PAGE = "results.md"


def crossing(accuracies: Sequence[float], target: float) -> float | None:
    """Return after how many rounds the best accuracy so far crosses the target, None if never.

    Between two rounds linearly (McMahan et al. 2017, section 3). `accuracies` begin with round 1.
    """
    best = 0.0
    for number, accuracy in enumerate(accuracies, start=1):
        if accuracy >= target:
            if number == 1:
                return 1.0
            return number - 1 + (target - best) / (accuracy - best)
        best = max(best, accuracy)
    return None


def write_page() -> None:
    """Write each table of the page anew from all results there are."""
    records = [
        json.loads(path.read_text())
        for row in ROWS
        for path in sorted(RESULTS.glob(f"{row.name}-[0-9].json"))
    ]
    for table in dict.fromkeys(row.table for row in ROWS):
        rows = [row for row in ROWS if row.table == table]
        write_section(table.name, "\n".join(_table(table.title, rows, records)), page=PAGE)


def _table(title: str, rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{title}",
        "",
        "| row | what | paper | ours | seeds | excluded by the norm band | time | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    commands = []
    for row in rows:
        of_row = [record for record in records if record["row"] == row.name]
        if not of_row:
            lines.append(f"| {row.name} | {row.what} | {row.goal} | not run yet | | | | |")
            continue
        measured = ", ".join(_measured_text(row, record) for record in of_row)
        seeds = ", ".join(str(record["seed"]) for record in of_row)
        minutes = ", ".join(f"{record['seconds'] / 60:.0f}" for record in of_row)
        excluded = ", ".join(map(_excluded, of_row))
        dates = ", ".join(dict.fromkeys(record["date"] for record in of_row))
        lines.append(
            f"| {row.name} | {row.what} | {row.goal} | {measured} | {seeds} | {excluded} | "
            f"{minutes} min | {dates} |"
        )
        commands.append(f"    {of_row[0]['command']}")
    if commands:
        commands = ["", "The server's commands, with the first seed:", "", *commands]
    machines = sorted(
        {record["machine"] for record in records if record["row"] in {r.name for r in rows}}
    )
    return [*lines, *commands, *(["", machines[-1]] if machines else [])]


def _excluded(record: Mapping[str, Any]) -> str:
    """Return how many of a run's updates the norm band excluded, "off" where the run had none."""
    if "--norm-band 0" in record["command"]:
        return "off"
    num_updates: Mapping[str, int] = record["num_updates"]
    return f"{num_updates['EXCLUDED']} of {sum(num_updates.values())}"


def _measured_text(row: Row, record: Mapping[str, Any]) -> str:
    """Return what a run reached, as it stands in the table."""
    accuracies: Sequence[float] = record["accuracies"]
    if row.target is None:
        after = f" after {len(accuracies)}" if len(accuracies) < row.rounds else ""
        return f"{accuracies[-1]:.2%}{after}"
    rounds = crossing(accuracies, row.target)
    if rounds is None:
        return f"not in {len(accuracies)} (best {max(accuracies):.2%})"
    if row.step_s:
        ends_s = [0.0, *record["round_ends_s"]]
        before_s, after_s = ends_s[math.ceil(rounds) - 1], ends_s[math.ceil(rounds)]
        part = rounds - math.ceil(rounds) + 1
        return f"{before_s + part * (after_s - before_s):.0f} s ({rounds:.1f} rounds)"
    return f"{rounds:.1f}"

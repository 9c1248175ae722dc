"""docs/results.md from the results that benchmarks.papers keeps."""

import json
from collections.abc import Sequence
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
        "| row | what | paper | ours | seeds | time | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    commands = [
        "",
        "The server's commands (with the first seed; the clients have `--doctor off`):",
        "",
    ]
    for row in rows:
        of_row = [one for one in records if one["row"] == row.name]
        if not of_row:
            lines.append(f"| {row.name} | {row.what} | {row.goal} | not run yet | | | |")
            continue
        ours = ", ".join(_found(row, one["accuracies"]) for one in of_row)
        seeds = ", ".join(str(one["seed"]) for one in of_row)
        minutes = ", ".join(f"{one['seconds'] / 60:.0f}" for one in of_row)
        lines.append(
            f"| {row.name} | {row.what} | {row.goal} | {ours} | {seeds} | {minutes} min | "
            f"{of_row[-1]['date']} |"
        )
        commands.append(f"    {of_row[0]['command']}")
    machines = sorted({one["machine"] for one in records if one["row"] in {r.name for r in rows}})
    return [*lines, *commands, "", *machines[-1:]]


def _found(row: Row, accuracies: Sequence[float]) -> str:
    """Return what a run found, as it stands in the table."""
    if row.target is None:
        return f"{accuracies[-1]:.2%}"
    rounds = crossing(accuracies, row.target)
    if rounds is None:
        return f"not in {len(accuracies)} (best {max(accuracies):.2%})"
    return f"{rounds:.1f}"

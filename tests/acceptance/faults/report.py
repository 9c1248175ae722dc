"""Writes the rows that a run of the fault suite left into docs/faults.md: see scripts/faults."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.federation import machine_line, write_section

_HEAD = """\
| fault | what happened | time to recover (s) | updates counted | lost | counted twice |
| --- | --- | --- | --- | --- | --- |"""


def table_row(row: dict[str, Any]) -> str:
    """Return a fault as a line of the table."""
    recovery = "-" if row["recovery_s"] is None else f"{row['recovery_s']:.2f}"
    seen = "; ".join(row["happened"]) or "nothing on record"
    return (
        f"| {row['fault']} | {seen} | {recovery} | {row['counted']} | {row['lost']} "
        f"| {row['twice']} |"
    )


def main(path: Path) -> None:
    """Write the table."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows, f"{path} holds no row: no fault was tested"
    head = f"{machine_line()}: `scripts/faults`, {len(rows)} faults"
    write_section("suite", "\n".join([head, "", _HEAD, *map(table_row, rows)]), page="faults.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

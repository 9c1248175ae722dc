"""`python -m fedserver history`: what happened, round by round."""

import json
from datetime import datetime
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.table import Table

from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.store import read_history
from shared.cli import parse


class HistorySettings(InspectionSettings):
    """Show the rounds of a run."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver history")

    json_: bool = Field(default=False, alias="json", description="as a JSON list of objects")


def run(argv: list[str]) -> None:
    """Print the history as a table, or as JSON."""
    settings = parse(HistorySettings, argv)
    with opened_run(settings) as (store, run):
        history = read_history(store, run)
    if settings.json_:
        print(json.dumps(history, indent=2))
        return
    console = Console()
    table = Table(title=f"{run.run_id}: {run.state.lower()}")
    for heading in ("round", "phase", "cohort", "counted", "accuracy", "loss", "seconds", "model"):
        table.add_column(heading, justify="right" if heading not in ("phase", "model") else "left")
    for entry in history:
        table.add_row(*_cells(entry))
    console.print(table)
    for entry in history:
        for incident in entry["incidents"]:
            console.print(_incident_line(entry["round"], incident), markup=False, highlight=False)


def _cells(entry: dict[str, Any]) -> list[str]:
    evaluation = entry["evaluation"] or {}
    counted = sum(update["verdict"] == "COUNTED" for update in entry["updates"])
    again = "" if entry["attempt"] == 1 else f" ({entry['attempt']})"
    seconds = ""
    if entry["finished_at"]:
        took = datetime.fromisoformat(entry["finished_at"]) - datetime.fromisoformat(
            entry["started_at"]
        )
        seconds = f"{took.total_seconds():.2f}"
    return [
        f"{entry['round']}{again}",
        entry["phase"].lower(),
        str(len(entry["cohort"])),
        str(counted),
        _number(evaluation.get("accuracy")),
        _number(evaluation.get("loss")),
        seconds,
        (entry["model_digest"] or "")[:12],
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _incident_line(round_number: int, incident: dict[str, Any]) -> str:
    known = {"kind", "at", "client"}
    rest = " ".join(f"{key}={value}" for key, value in incident.items() if key not in known)
    who = "" if incident["client"] is None else f" client {incident['client']}:"
    return f"{incident['at'][:19]} round {round_number}:{who} {incident['kind']} {rest}".rstrip()

"""`python -m fedserver history`: a run, round by round."""

import json

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedrounds.cli import parse
from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.reporting.as_json import attempt_json
from fedserver.reporting.round_report import incident_lines
from fedserver.reporting.tables import round_table
from fedserver.store import read_history


class HistorySettings(InspectionSettings):
    """Show the rounds of a run."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver history")

    last: int | None = Field(default=None, ge=1, description="show only this many last rounds")
    json_: bool = Field(default=False, alias="json", description="print a JSON list of objects")


def run(argv: list[str]) -> None:
    """Print the history as a table, or as JSON."""
    settings = parse(HistorySettings, argv)
    with opened_run(settings) as (store, run):
        first = 1
        if settings.last is not None:
            first = (store.rounds.latest_round_number(run.run_id) or 0) - settings.last + 1
        history = read_history(store, run, first_round=first)
    if settings.json_:
        print(json.dumps([attempt_json(attempt) for attempt in history], indent=2))
        return
    console = Console()
    console.print(
        round_table(history, title=f"{run.run_id}: {run.state.lower()}", max_width=console.width)
    )
    for line in incident_lines(history):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

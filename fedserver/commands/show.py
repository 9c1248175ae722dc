"""`python -m fedserver show`: one round, as a report for a person."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedrounds.cli import parse
from fedrounds.errors import NotFound
from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.history import AttemptHistory
from fedserver.numbers import numbers_text
from fedserver.reporting.as_json import attempt_json
from fedserver.reporting.diagnosis_report import diagnosed_incidents, draw_diagnosis
from fedserver.reporting.round_report import round_report
from fedserver.run_settings import recorded_settings
from fedserver.store import read_history


class ShowSettings(InspectionSettings):
    """Show a round: when it was, who took part, its result, and what went wrong."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver show")

    round: int | None = Field(
        default=None, ge=1, description="number of the round; none: the latest"
    )
    json_: bool = Field(default=False, alias="json", description="print a JSON object")
    diagnosis_out: Path | None = Field(
        default=None,
        description="draw the trend of a client's diagnosis into this PNG (extra `plot`)",
    )
    client: int | None = Field(
        default=None,
        ge=0,
        description="draw this client's diagnosis; none: the last diagnosis of the round",
    )


def run(argv: list[str]) -> None:
    """Print the round's report, or its JSON, and draw a diagnosis if asked to."""
    settings = parse(ShowSettings, argv)
    with opened_run(settings) as (store, run):
        latest = store.rounds.latest_round_number(run.run_id)
        if latest is None:
            raise NotFound(
                f"{run.run_id} has no round yet; it begins when enough clients are there"
            )
        number = latest if settings.round is None else settings.round
        # The round before it says what the model was that it began with.
        history = read_history(store, run, first_round=number - 1, last_round=number)
        digest = store.ledger.entry_digest(run.run_id, number)
        suspensions = store.quarantine.suspensions(run.run_id)
        if settings.client is not None and not store.orders.knows_client(
            run.run_id, settings.client
        ):
            raise NotFound(
                f"{run.run_id} has no client {settings.client}: it was never asked, and it isn't "
                "connected; check --client"
            )
    attempts = [attempt for attempt in history if attempt.round_number == number]
    if not attempts:
        raise NotFound(f"{run.run_id} has no round {number}; its latest is round {latest}")
    if settings.diagnosis_out is not None:
        _draw(attempts, settings.diagnosis_out, client_id=settings.client)
    if settings.json_:
        report = {
            "run": run.run_id,
            "round": number,
            "attempts": [attempt_json(attempt) for attempt in attempts],
            "entry_digest": digest,
        }
        print(json.dumps(report, indent=2))
        return
    run_settings = recorded_settings(run.settings)
    console = Console()
    for part in round_report(
        history,
        number,
        latest_round=latest,
        title=f"{run.run_id}, round {number} of {run_settings.rounds}",
        entry_digest=digest,
        suspensions=suspensions,
        run_settings=run_settings,
        max_width=console.width,
    ):
        console.print(part, highlight=False)


def _draw(attempts: Sequence[AttemptHistory], path: Path, *, client_id: int | None) -> None:
    """Draw the last diagnosis of a round's attempts, or the last of one client's."""
    known = [incident for attempt in attempts for incident in diagnosed_incidents(attempt)]
    wanted = [incident for incident in known if client_id in (None, incident.client_id)]
    number = attempts[0].round_number
    if not wanted:
        clients = numbers_text(
            {incident.client_id for incident in known if incident.client_id is not None}
        )
        raise NotFound(
            f"no diagnosis of {'any client' if client_id is None else f'client {client_id}'} in "
            f"round {number}; clients with one: {clients}"
        )
    with drawing_into(path, flag="--diagnosis-out"):
        draw_diagnosis(wanted[-1], path, title=f"client {wanted[-1].client_id}, round {number}")
    print(f"the diagnosis of client {wanted[-1].client_id} is in {path}", file=sys.stderr)

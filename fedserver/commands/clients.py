"""`python -m fedserver clients`: how good a round's model is on each client."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedrounds.cli import parse
from fedrounds.errors import NotFound
from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.history import attempts_that_asked
from fedserver.numbers import numbers_text
from fedserver.reporting.client_report import client_evaluation_text, client_table, draw_clients
from fedserver.store import read_history, read_rounds


class ClientsSettings(InspectionSettings):
    """Show how good a model is on each client, as the clients reported when the next round began.

    A run must ask them (--evaluate-on-clients, best with --holdout). Of its last model nobody has
    been asked. Round 0 is the model that the run began with.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver clients")

    round: int | None = Field(
        default=None, ge=0, description="show this round's model; none: the last"
    )
    out: Path | None = Field(default=None, description="also draw it into this PNG (extra `plot`)")


def run(argv: list[str]) -> None:
    """Print the table, the spread, and draw them if asked to."""
    settings = parse(ClientsSettings, argv)
    with opened_run(settings) as (store, run):
        known = attempts_that_asked(read_rounds(store, run))
        wanted = max(known, default=None) if settings.round is None else settings.round
        if wanted is None or wanted not in known:
            which = "any model" if wanted is None else f"the model of round {wanted}"
            raise NotFound(
                f"no client has evaluated {which}; rounds that clients have evaluated: "
                f"{numbers_text(known)} (they are asked with --evaluate-on-clients, and "
                "answer with the updates of the round after)"
            )
        number = known[wanted].round_number
        (asked,) = (
            attempt
            for attempt in read_history(store, run, first_round=number, last_round=number)
            if attempt.attempt == known[wanted].attempt
        )
    evaluation = asked.client_evaluation
    assert evaluation is not None
    title = f"{run.run_id}, model of round {wanted} on {int(evaluation.num_clients)} clients"
    console = Console()
    console.print(client_table(asked, title=title, max_width=console.width))
    console.print(client_evaluation_text(evaluation), highlight=False)
    if settings.out is not None:
        with drawing_into(settings.out):
            draw_clients(asked, settings.out, title=title)
        print(f"the picture of the clients is in {settings.out}")

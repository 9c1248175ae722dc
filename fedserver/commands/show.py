"""`python -m fedserver show`: one round, told as a person would."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedserver.account import round_account
from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.store import read_history
from shared.cli import parse
from shared.errors import NotFound


class ShowSettings(InspectionSettings):
    """Tell what happened in a round: when, who took part, what came of it, what went wrong."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver show")

    round: int | None = Field(default=None, ge=1, description="number of the round; the latest")


def run(argv: list[str]) -> None:
    """Print the round's account."""
    settings = parse(ShowSettings, argv)
    with opened_run(settings) as (store, found):
        history = read_history(store, found)
        entries = store.read_ledger(found.run_id).entries
        standings = store.standings(found.run_id)
    if not history:
        raise NotFound(f"{found.run_id} has no round yet; it begins when enough clients are there")
    latest = history[-1]["round"]
    number = latest if settings.round is None else settings.round
    if number not in {one["round"] for one in history}:
        raise NotFound(f"{found.run_id} has no round {number}; its latest is round {latest}")
    of_rounds = f" of {found.settings['rounds']}" if "rounds" in found.settings else ""
    console = Console()
    for part in round_account(
        history,
        number,
        title=f"{found.run_id}, round {number}{of_rounds}",
        entry_digest={one.round_number: one.digest for one in entries}.get(number),
        standings=standings,
        max_width=console.width,
    ):
        console.print(part, highlight=False)

"""`python -m fedserver curve`: accuracy and loss over the rounds as a picture."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import parse
from fedrounds.errors import NotFound
from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.history import attempts_that_asked
from fedserver.reporting.tables import draw_curve
from fedserver.run_settings import recorded_settings
from fedserver.store import read_rounds


class CurveSettings(InspectionSettings):
    """Draw accuracy and loss over the rounds (needs the extra `plot`)."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver curve")

    out: Path = Field(default=Path("curve.png"), description="the PNG to write")


def run(argv: list[str]) -> None:
    """Draw the picture."""
    settings = parse(CurveSettings, argv)
    with opened_run(settings) as (store, run):
        goal = recorded_settings(run.settings).goal
        rounds = read_rounds(store, run, metric=goal.name)
    if not attempts_that_asked(rounds) and not any(
        attempt.is_done and attempt.evaluation is not None for attempt in rounds
    ):
        raise NotFound(
            f"{run.run_id} has nothing to draw: no round that is done has an evaluation (a task "
            "without a held-out set has none)"
        )
    with drawing_into(settings.out):
        draw_curve(rounds, settings.out, goal=goal)
    print(f"the curve is in {settings.out}")

"""`python -m fedserver curve`: accuracy and loss over the rounds as a picture."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import parse
from fedrounds.errors import NotFound
from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.models.client_metrics import told_of_models
from fedserver.reporting.tables import draw_curve
from fedserver.store import read_rounds


class CurveSettings(InspectionSettings):
    """Draw accuracy and loss over the rounds (needs the extra `plot`)."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver curve")

    out: Path = Field(default=Path("curve.png"), description="the PNG to write")


def run(argv: list[str]) -> None:
    """Draw the picture."""
    settings = parse(CurveSettings, argv)
    with opened_run(settings) as (store, run):
        rounds = read_rounds(store, run)
    if not told_of_models(rounds) and not any(
        one["evaluation"] and one["phase"] == "DONE" for one in rounds
    ):
        raise NotFound(
            f"{run.run_id} has nothing to draw: no round that is done has an evaluation (a task "
            "without a held-out set has none)"
        )
    with drawing_into(settings.out):
        draw_curve(rounds, settings.out)
    print(f"the curve is in {settings.out}")

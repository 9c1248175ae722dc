"""`python -m fedserver curve`: accuracy and loss over the rounds as a picture."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.report import draw_curve
from fedserver.store import read_history
from shared.cli import parse


class CurveSettings(InspectionSettings):
    """Draw accuracy and loss over the rounds (needs the extra `plot`)."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver curve")

    out: Path = Field(default=Path("curve.png"), description="the PNG to write")


def run(argv: list[str]) -> None:
    """Draw the picture."""
    settings = parse(CurveSettings, argv)
    with opened_run(settings) as (store, run):
        history = read_history(store, run)
    with drawing_into(settings.out):
        draw_curve(history, settings.out)
    print(f"the curve is in {settings.out}")

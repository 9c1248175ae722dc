"""`python -m fedserver curve`: accuracy and loss over the rounds as a picture."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.report import draw_curve
from fedserver.store import read_history
from shared.cli import parse
from shared.errors import InvalidInput


class CurveSettings(InspectionSettings):
    """Draw accuracy and loss over the rounds (needs the extra `plot`)."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver curve")

    out: Path = Field(default=Path("curve.png"), description="the PNG to write")


def run(argv: list[str]) -> None:
    """Draw the picture."""
    settings = parse(CurveSettings, argv)
    with opened_run(settings) as (store, run):
        history = read_history(store, run)
    try:
        draw_curve(history, settings.out)
    except ImportError as error:
        raise InvalidInput(
            "drawing needs matplotlib; install it with: python -m pip install 'fedrounds[plot]'"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"can't draw into {settings.out}: {error}; choose --out") from error
    print(f"the curve is in {settings.out}")

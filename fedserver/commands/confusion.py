"""`python -m fedserver confusion`: which classes a round's model takes for which."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedrounds.cli import parse
from fedrounds.errors import NotFound
from fedserver.commands.inspection import InspectionSettings, drawing_into, opened_run
from fedserver.numbers import numbers_text
from fedserver.reporting.tables import class_table, draw_confusion
from fedserver.store import read_history, read_rounds


class ConfusionSettings(InspectionSettings):
    """Show how a model does on each class of the held-out set."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver confusion")

    round: int | None = Field(default=None, ge=1, description="number of the round; none: the last")
    out: Path | None = Field(default=None, description="also draw it into this PNG (extra `plot`)")


def run(argv: list[str]) -> None:
    """Print the confusion matrix and each class's accuracy, and draw it if asked to."""
    settings = parse(ConfusionSettings, argv)
    with opened_run(settings) as (store, run):
        known = {
            attempt.round_number
            for attempt in read_rounds(store, run)
            if attempt.is_done and attempt.has_confusion
        }
        wanted = max(known, default=None) if settings.round is None else settings.round
        if wanted is None or wanted not in known:
            raise NotFound(
                f"no confusion matrix of {'any round' if wanted is None else f'round {wanted}'}; "
                f"rounds with one: {numbers_text(known)} (a task must have a held-out set and say "
                "how many classes it has, at most 100)"
            )
        (evaluation,) = (
            attempt.evaluation
            for attempt in read_history(store, run, first_round=wanted, last_round=wanted)
            if attempt.is_done
        )
    assert evaluation is not None
    assert evaluation.confusion is not None
    title = f"{run.run_id}, round {wanted}: accuracy {evaluation.accuracy:.2%}"
    Console().print(class_table(evaluation, title=title))
    if settings.out is not None:
        with drawing_into(settings.out):
            draw_confusion(evaluation.confusion, settings.out, title=title)
        print(f"the confusion matrix is in {settings.out}")

"""`python -m fedserver export`: a round's global model as a safetensors file."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import parse
from fedrounds.errors import InvalidInput, NotFound
from fedrounds.files import replace_file
from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.history import best_round, models_by_round
from fedserver.numbers import numbers_text
from fedserver.run_settings import recorded_settings
from fedserver.store import read_rounds


class ExportSettings(InspectionSettings):
    """Write a round's global model to a file, with the names of its state_dict."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver export")

    best: bool = Field(default=False, description="export the best model (--best-by)")
    round: int | None = Field(default=None, ge=1, description="number of the round; none: the last")
    out: Path = Field(description="the file to write, such as model.safetensors")


def run(argv: list[str]) -> None:
    """Copy the model's bytes; they are a safetensors file already."""
    settings = parse(ExportSettings, argv)
    with opened_run(settings) as (store, run):
        goal = recorded_settings(run.settings).goal
        rounds = read_rounds(store, run, metric=goal.name)
    done = models_by_round(rounds)
    if settings.best and settings.round:
        raise InvalidInput("--best and --round name a round each; give one of them")
    number = (best_round(rounds, goal) if settings.best else settings.round) or max(done, default=0)
    if number not in done:
        raise NotFound(
            f"round {number} of {run.run_id} isn't done; done are: {numbers_text(done)}"
            if settings.round
            else f"no round of {run.run_id} is done yet; try again later"
        )
    source = settings.state_dir / "models" / f"{done[number]}.safetensors"
    try:
        content = source.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"the model of round {number} isn't kept any more ({source})") from error
    try:
        replace_file(settings.out, content, survive_power_loss=True)
    except OSError as error:
        raise InvalidInput(f"can't write {settings.out}: {error.strerror}; choose --out") from error
    print(f"round {number}: {settings.out} ({len(content)} bytes, digest {done[number]})")

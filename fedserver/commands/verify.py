"""`python -m fedserver verify`: whether what a state-dir holds is what was written."""

from itertools import pairwise

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import parse
from fedrounds.errors import StorageDamaged
from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.verification.verify import verify


class VerifySettings(InspectionSettings):
    """Examine what a state-dir holds, and aggregate again every round whose updates are kept.

    Looked at are the database, the ledger's chain, the tables beside it, every model, update and
    quarantined payload that is kept, and whether each round's updates still make its model, to the
    byte. Each finding is a line that names the round and the thing; the last line sums up.

    It finds accidents, such as a flipped bit or a row that is gone. Somebody who can rewrite
    everything in the folder can make it agree with itself: against an attacker it proves nothing.

    It writes nothing and works beside a server that runs. It imports the runs' task.

    Exit code: 0 nothing was found; 1 something was, or it couldn't be examined (a sentence on
    standard error); 2 wrong usage.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver verify")

    run: int | None = Field(default=None, ge=1, description="number of the run; none: all runs")
    round: int | None = Field(
        default=None, ge=1, description="verify the files of this round only; none: of all"
    )


def run(argv: list[str]) -> int:
    """Print the findings and a summary; return the exit code."""
    settings = parse(VerifySettings, argv)
    num_gaps = 0
    try:
        with opened_run(settings) as (store, inspected):
            runs = [inspected] if settings.run else store.runs.all_runs()
            numbers = [run.number for run in runs]
            for before, number in pairwise(numbers if settings.run else [0, *numbers]):
                if number > before + 1:
                    num_gaps += 1
                    _tell(f"{number - before - 1} runs are missing before run {number}")
            verdict = verify(
                store,
                settings.state_dir,
                runs,
                round_number=settings.round,
                tell=_tell,
            )
    except StorageDamaged as error:
        _tell(str(error))
        return 1
    print(verdict.summary)
    return 0 if verdict.num_findings + num_gaps == 0 else 1


def _tell(finding: str) -> None:
    print(finding, flush=True)

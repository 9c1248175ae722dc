"""Settings of the server that contradict each other, and how many clients they ask for."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from fedrounds.errors import InvalidInput, OwnCodeFailed
from fedrounds.types import MAX_DURATION_S, MAX_INT32, MAX_UINT64, SessionInfo
from fedrounds.wire.messages import order_message, session_message
from fedserver.server import run_server
from fedserver.settings import ServerSettings, settings_begun_with
from tests.factories import make_order
from tests.tiny_task import tiny

half = replace(tiny, build_model=lambda: nn.Linear(8, 3, dtype=torch.bfloat16))
"""A task whose numbers take 16 bits already."""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"over_select": 1.3}, "say how many those are with --clients-per-round"),
        (
            {"over_select": 1.3, "clients_per_round": 4, "require_all": True},
            "--require-all waits for everybody",
        ),
        ({"clients_per_round": 2, "min_updates": 3}, "lower --min-updates"),
        ({"work_deadline": 5, "require_all": True}, "--work-deadline lets time decide"),
        ({"straggler_work": "none"}, "say which share they are"),
        ({"cohort": "round-robin"}, "say how many it asks with --clients-per-round"),
        ({"cohort_candidates": 5}, "of --cohort power-of-choice alone"),
        (
            {"cohort": "power-of-choice", "clients_per_round": 5, "cohort_candidates": 4},
            "less than the 5 clients that a round asks",
        ),
        ({"holdout": 0.2}, "nobody is asked about; add --evaluate-on-clients"),
        ({"holdout": 1, "evaluate_on_clients": True}, "less than 1"),
        ({"cohort": "anybody"}, "uniform"),
        ({"keep_updates": -1}, "greater than or equal to 0"),
        ({"keep_rounds": 0}, "greater than or equal to 1"),
        ({"keep_rounds": "some"}, "all"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], words: str
) -> None:
    """No run begins with settings of which one defeats the other."""
    with pytest.raises(ValueError, match=words):
        ServerSettings(**settings)  # type: ignore[arg-type]


def test_a_run_goes_on_with_the_models_it_was_begun_to_keep() -> None:
    """--keep-rounds may change when the server is started again; not given it stays what it was."""
    begun = ServerSettings(keep_rounds=3).run_settings()
    assert ServerSettings().keep_rounds == 10
    assert ServerSettings().going_on_with(begun).keep_rounds == 3
    assert ServerSettings(keep_rounds="all").going_on_with(begun).keep_rounds == "all"


def test_a_run_of_earlier_software_keeps_what_it_was_begun_with() -> None:
    """It kept all models; its defaults may have been others; what is given wins over both."""
    begun = ServerSettings(lr=0.3, rounds=7).run_settings()
    del begun["keep_rounds"], begun["norm_band"]
    started = ServerSettings(rounds=8, norm_band=4).going_on_with(begun)
    assert (started.lr, started.rounds, started.norm_band) == (0.3, 8, 4)
    assert started.keep_rounds == "all"
    today = settings_begun_with(begun)
    assert (today["lr"], today["norm_band"], today["keep_rounds"]) == (0.3, 10, "all")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_compression_that_saves_nothing_is_refused_at_the_start(
    tmp_path: Path, name: Literal["float16", "bfloat16"]
) -> None:
    """Before a state-dir is made."""
    state_dir = tmp_path / "server"
    settings = ServerSettings(task=f"{__name__}:half", compression=name, state_dir=state_dir)
    with pytest.raises(
        InvalidInput, match=rf"--compression {name} makes 54 bytes of the 54 of this"
    ):
        run_server(settings)
    assert not state_dir.exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("narrow_test", "evaluating the model on the first held-out examples failed with Runtime"),
        ("bad_metric", "evaluating the model on the first held-out examples failed with KeyError"),
    ],
)
def test_what_cant_be_evaluated_is_refused_at_the_start(
    tmp_path: Path, name: str, sentence: str
) -> None:
    """By a trial on the first held-out examples, before a state-dir is made."""
    state_dir = tmp_path / "server"
    settings = ServerSettings(task=f"tests.own_code_tasks:{name}", state_dir=state_dir)
    with pytest.raises(OwnCodeFailed, match=sentence):
        run_server(settings)
    assert not state_dir.exists()


TRAVELLING = {
    "rounds": MAX_INT32,
    "epochs": MAX_INT32,
    "batch_size": MAX_INT32,
    "decay_epochs": MAX_INT32,
    "num_partitions": MAX_INT32,
    "seed": MAX_UINT64,
    "lease": MAX_DURATION_S,
    "work_deadline": MAX_DURATION_S,
}
"""The numbers that are sent to clients, with the most that their fields hold."""


@pytest.mark.parametrize("name", TRAVELLING)
def test_a_number_that_is_sent_fits_its_field(name: str) -> None:
    """Else no client could register or pull an order."""
    settings = ServerSettings.model_validate({"epochs": 1, "rounds": 1, name: TRAVELLING[name]})
    session_message(
        SessionInfo(
            session_id="s",
            run_id="r",
            task=settings.task,
            partitioning=settings.partitioning,
            max_wait_s=settings.lease,
            lease_s=settings.lease,
            total_rounds=settings.rounds,
        )
    )
    order_message(replace(make_order(), training=settings.training_in(settings.rounds)))
    with pytest.raises(ValueError, match="less than or equal to"):
        ServerSettings.model_validate({name: 2 * TRAVELLING[name]})


def test_a_schedule_over_the_run_fits_its_field() -> None:
    with pytest.raises(ValueError, match="more than the 2147483647 epochs"):
        ServerSettings(rounds=MAX_INT32, epochs=2)

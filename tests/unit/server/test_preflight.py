"""What is refused before a run begins or goes on; each refusal says what to do."""

from pathlib import Path

import pytest

from fedrounds.errors import InvalidInput, StorageDamaged, WrongSettings
from fedrounds.goals import LOWEST_LOSS, Goal
from fedserver.preflight import (
    best_beside,
    expect_database,
    validate_compression,
    validate_export,
    validate_goals,
    validate_going_on,
    validate_strategy,
)
from fedserver.run_context import strategy_of
from fedserver.settings import ServerSettings, differing_settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "krum", "min_clients": 2}, r"needs at least 5 updates .* but 2 are enough"),
        ({"concurrency": 3}, "are of asynchronous strategies alone"),
        ({"max_staleness": 0}, "are of asynchronous strategies alone"),
        (
            {
                "strategy": "krum",
                "min_clients": 5,
                "stragglers": 0.5,
                "straggler_work": "none",
            },
            "--straggler-work none leaves clients out",
        ),
        ({"strategy": "fedbuff", "min_updates": 2}, "leave out --min-updates, say how many it is"),
        ({"strategy": "fedbuff", "require_all": True}, "leave out --require-all"),
        ({"strategy": "fedbuff", "round_deadline": 1}, "leave out --round-deadline"),
    ],
    ids=str,
)
def test_a_strategy_that_the_settings_starve_is_refused(
    settings: dict[str, object], words: str
) -> None:
    """Too few updates for it, or flags that it has no use for."""
    chosen = ServerSettings.model_validate(settings)
    with pytest.raises(InvalidInput, match=words):
        validate_strategy(chosen, strategy_of(chosen))


def test_a_compression_must_make_updates_smaller() -> None:
    """As many bytes are too many; without compression they are as many, and that is right."""
    validate_compression(ServerSettings(), compressed_bytes=100, model_bytes=100)
    chosen = ServerSettings(compression="int8")
    validate_compression(chosen, compressed_bytes=99, model_bytes=100)
    with pytest.raises(InvalidInput, match="makes 100 bytes of the 100 of this model's parameters"):
        validate_compression(chosen, compressed_bytes=100, model_bytes=100)


def test_a_run_goes_on_with_the_settings_it_began_with_alone(tmp_path: Path) -> None:
    """The refusal names each setting that differs, with both values."""
    recorded = ServerSettings(rounds=3, lr=0.1).run_settings()
    same = ServerSettings(rounds=3, lr=0.1, port=0)
    validate_going_on(tmp_path, differing_settings(same, recorded))
    other = differing_settings(ServerSettings(rounds=4, lr=0.2), recorded)
    with pytest.raises(WrongSettings, match=r"rounds was 3, is now 4; lr was 0.1, is now 0.2"):
        validate_going_on(tmp_path, other)


def test_the_final_model_goes_to_a_file_that_can_be_written(tmp_path: Path) -> None:
    """Also the best model beside it."""
    validate_export(tmp_path / "final.safetensors")
    with pytest.raises(InvalidInput, match="there is no such folder; make it first"):
        validate_export(tmp_path / "missing" / "final.safetensors")
    with pytest.raises(InvalidInput, match="is a folder; name a file"):
        validate_export(tmp_path)
    best_beside(tmp_path / "final.safetensors").mkdir()
    with pytest.raises(InvalidInput, match=r"final-best.safetensors is a folder"):
        validate_export(tmp_path / "final.safetensors")


@pytest.mark.parametrize("folder", ["models", "spool"])
def test_files_of_a_run_without_its_database_are_refused(tmp_path: Path, folder: str) -> None:
    """An empty state-dir is new; so is a state-dir whose folders are empty."""
    (tmp_path / folder).mkdir()
    expect_database(tmp_path)
    (tmp_path / folder / "file").touch()
    with pytest.raises(StorageDamaged, match="put the database back"):
        expect_database(tmp_path)
    (tmp_path / "federation.sqlite").touch()
    expect_database(tmp_path)


def test_numbers_that_arent_measured_are_refused() -> None:
    """By the flag that names them; without a held-out set there is nothing to stop by."""
    for settings, flag in (
        ({"best_by": "f2:max"}, "--best-by"),
        ({"stop_when": "f2>0.5"}, "--stop-when"),
    ):
        given = ServerSettings(**settings).with_goal_of("loss:min")  # type: ignore[arg-type]
        with pytest.raises(
            InvalidInput, match=f"{flag} names 'f2', but .* measures f1, loss; name"
        ):
            validate_goals(given, {"f1", "loss"}, task="own")
        validate_goals(given, {"f2", "loss"}, task="own")
    for early in (ServerSettings(patience=2), ServerSettings(stop_when="loss<1")):
        given = early.with_goal_of("f1:max")
        with pytest.raises(InvalidInput, match="task 'own' has none here"):
            validate_goals(given, None, task="own")
    validate_goals(ServerSettings().with_goal_of("f1:max"), None, task="own")


def test_the_tasks_best_model_holds_where_none_is_given() -> None:
    """It isn't taken for given, so a run of earlier software goes on by its accuracy."""
    settings = ServerSettings().with_goal_of("f1:max")
    assert settings.run_settings()["best_by"] == "f1:max"
    assert settings.going_on_with({}).goal == Goal("accuracy", is_highest=True)
    assert ServerSettings(best_by="loss:min").with_goal_of("f1:max").goal == LOWEST_LOSS

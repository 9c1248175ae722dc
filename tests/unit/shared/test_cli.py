"""Settings: which source wins, where a value came from, and the error of each mistake."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from fedclient.__main__ import COMMANDS as CLIENT_COMMANDS
from fedclient.settings import ClientSettings, DoctorCommandSettings
from fedrounds.cli import COMMANDS, Settings, parse
from fedserver.__main__ import COMMANDS as SERVER_COMMANDS
from fedserver.commands.history import HistorySettings
from fedserver.settings import ServerSettings


def _refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the sentence that settings end with; a mistake in them is exit code 2."""
    with pytest.raises(SystemExit) as ended:
        parse(ServerSettings, list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err


def _toml(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


def test_a_flag_beats_the_environment_and_that_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three settings is given in one place more than the setting before."""
    config = _toml(tmp_path, "rounds = 3\nlr = 0.3\nepochs = 3\n")
    monkeypatch.setenv("FEDSERVER_LR", "0.2")
    monkeypatch.setenv("FEDSERVER_EPOCHS", "2")
    settings = parse(ServerSettings, ["--config", config, "--epochs", "1"])
    assert (settings.rounds, settings.lr, settings.epochs) == (3, 0.2, 1)


def test_a_command_without_a_prefix_takes_nothing_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names as short as these are in many an environment, and mean something else there."""
    for name in ("ID", "SEED", "LR", "TASK", "STEPS"):
        monkeypatch.setenv(name, "7")
    assert parse(DoctorCommandSettings, []) == DoctorCommandSettings()
    assert DoctorCommandSettings().id == 0


def test_print_config_says_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is TOML again: given as a file it makes the same settings."""
    config = _toml(tmp_path, "rounds = 3\n")
    monkeypatch.setenv("FEDSERVER_LR", "0.2")
    argv = ["--config", config, "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        parse(ServerSettings, [*argv, "--print-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(" = ", 1) for line in printed.splitlines() if " = " in line)
    assert lines["rounds"] == f"3  # {config}"
    assert lines["lr"] == "0.2  # environment (FEDSERVER_LR)"
    assert lines["epochs"] == "1  # flag"
    assert lines["port"] == "50051  # default"
    given = parse(ServerSettings, argv)
    monkeypatch.delenv("FEDSERVER_LR")
    again = parse(ServerSettings, ["--config", _toml(tmp_path, printed)])
    assert again.model_dump(exclude={"config"}) == given.model_dump(exclude={"config"})


def test_print_config_calls_a_setting_what_its_flag_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(HistorySettings, ["--json", "--print-config"])
    assert "json = true  # flag" in capsys.readouterr().out.splitlines()


def test_the_error_of_an_unknown_setting_names_the_nearest_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no flag --epoch; did you mean --epochs?" in _refusal(capsys, "--epoch", "3")
    assert "no command rounds; settings are given as --name" in _refusal(capsys, "rounds", "3")
    config = _toml(tmp_path, "learning_rate = 1\nepochss = 3\n")
    refusal = _refusal(capsys, "--config", config)
    assert f"in {config} there is no setting 'epochss'; did you mean 'epochs'?" in refusal
    assert "there is no setting 'learning_rate'" in refusal


def test_the_error_of_an_unknown_variable_with_the_prefix_names_the_nearest_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other side's variables, and everybody else's, are none of its business."""
    monkeypatch.setenv("FEDCLIENT_ROUND", "3")
    monkeypatch.setenv("fedserver_epochs", "4")
    assert parse(ServerSettings, []).epochs == 4
    monkeypatch.setenv("FEDSERVER_ROUND", "3")
    refusal = _refusal(capsys)
    assert "FEDSERVER_ROUND, which is no setting; did you mean FEDSERVER_ROUNDS?" in refusal


def test_the_settings_file_is_named_by_a_flag_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag comes first; a settings file can't name another settings file: it would be ignored."""
    monkeypatch.setenv("FEDSERVER_CONFIG", _toml(tmp_path, "rounds = 3\n"))
    assert parse(ServerSettings, []).rounds == 3
    (tmp_path / "flag").mkdir()
    by_flag = _toml(tmp_path / "flag", "rounds = 4\n")
    assert parse(ServerSettings, ["--config", by_flag]).rounds == 4
    for name in ("config = 'other.toml'", "print_config = true"):
        by_flag = _toml(tmp_path / "flag", name)
        refusal = _refusal(capsys, "--config", by_flag)
        assert f"can't stand in a settings file, as in {by_flag}; give --" in refusal
    assert "--config needs a value after it" in _refusal(capsys, "--config")


def test_a_flag_takes_back_what_a_file_switched_on(tmp_path: Path) -> None:
    config = _toml(tmp_path, "require_all = true\ngive_up_damaged = true\n")
    settings = parse(ServerSettings, ["--config", config, "--no-require-all"])
    assert (settings.require_all, settings.give_up_damaged) == (False, True)


def test_the_error_of_an_invalid_value_names_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it stands."""
    assert "--rounds is '0'" in _refusal(capsys, "--rounds", "0")
    assert "--lr is 'fast'" in _refusal(capsys, "--lr", "fast")
    assert "--lr is 'nan'" in _refusal(capsys, "--lr", "nan")
    assert "can't be read" in _refusal(capsys, "--config", str(tmp_path / "none.toml"))
    assert "is not TOML" in _refusal(capsys, "--config", _toml(tmp_path, "rounds: 3"))
    config = _toml(tmp_path, "rounds = 'x'")
    refusal = _refusal(capsys, "--config", config)
    assert f"in {config}, rounds is 'x': input should be" in refusal
    monkeypatch.setenv("FEDSERVER_PORT", "high")
    refusal = _refusal(capsys)
    assert "FEDSERVER_PORT is 'high': input should be" in refusal
    assert "--" not in refusal
    refusal = _refusal(capsys, "--log-level", "loud")
    assert "--log-level is 'loud': input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'" in refusal


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ("--keep-rounds", "0"),
            "--keep-rounds is '0': input should be greater than or equal to 1, or input should be "
            "'all'",
        ),
        (
            ("--strategy-parameters", "mu=q"),
            "--strategy-parameters: mu is 'q': input should be a valid number, unable to parse "
            "string as a number",
        ),
    ],
)
def test_an_error_of_a_setting_of_several_types_or_values_is_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], sentence: str
) -> None:
    """In the user's words, not in those of the library that validates."""
    assert _refusal(capsys, *argv).splitlines() == [f"python -m fedserver: {sentence}"]


def test_the_name_of_a_value_is_refused_as_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ClientSettings, ["--id", "1", "--doctor-policies", "x=cure"])
    assert "--doctor-policies has the name 'x': input should be " in capsys.readouterr().err


def test_the_word_none_can_be_chosen_where_it_is_a_choice() -> None:
    """Elsewhere it takes a setting back, as --data-root none does."""
    settings = parse(
        ServerSettings,
        [
            *("--stragglers", "0.5", "--straggler-work", "none", "--augment", "none"),
            *("--data-root", "none"),
        ],
    )
    assert (settings.straggler_work, settings.augment) == ("none", "none")
    assert settings.data_root is None


@pytest.mark.parametrize(
    "server",
    [
        *("localhost", "localhost:port", ":50051", "there:0", "a:70000", "http://host:50051"),
        *("host:1:2", "my host:50051", " host:50051", "host:50051 ", "::1:50051", "[::1]", "[]:1"),
    ],
)
def test_a_client_never_waits_for_a_server_nowhere(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that can't be an address is an error at the start."""
    with pytest.raises(SystemExit):
        parse(ClientSettings, ["--id", "1", "--server", server])
    assert f"--server is '{server}': write it as host:port" in capsys.readouterr().err


@pytest.mark.parametrize("server", ["localhost:1", "10.0.0.7:65535", "[::1]:50051", "a-b.c:80"])
def test_a_valid_address_is_taken(server: str) -> None:
    assert parse(ClientSettings, ["--id", "1", "--server", server]).server == server


@pytest.mark.parametrize(
    ("argv", "client_ids", "folder"),
    [
        (["--id", "3"], (3,), "state/client-3"),
        (["--ids", "0-3"], (0, 1, 2, 3), "state/clients-0-3"),
        (["--ids", "7, 0-1,3"], (7, 0, 1, 3), "state/clients-7,0-1,3"),
        (["--ids", "5", "--state-dir", "mine"], (5,), "mine"),
    ],
)
def test_a_client_process_is_one_client_or_many(
    argv: list[str], client_ids: tuple[int, ...], folder: str
) -> None:
    settings = parse(ClientSettings, argv)
    assert (settings.client_ids, settings.folder) == (client_ids, Path(folder))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "--id 3 for one client, or --ids 0-99 for many"),
        (["--id", "3", "--ids", "0-4"], "many, not both"),
        (["--ids", "0-4,3"], "names client 3 twice"),
        (["--ids", "4-0"], "'4-0': write it as 0-99"),
        (["--ids", "0-"], "'0-': write it as 0-99"),
        (["--ids", "0-10000"], "at most 10000 clients"),
        (["--ids", f"{2**53 + 1}"], "ids go up to 2"),
        (["--ids", ",".join(map(str, range(60)))], "give --state-dir"),
        (["--ids", "0-4", "--source", "local"], "one process with --id for each"),
    ],
)
def test_which_clients_a_process_is_must_be_clear(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(ClientSettings, argv)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_error_of_a_misspelt_command_names_the_nearest_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(ClientSettings, ["partition"])
    assert "no command partition; did you mean partitions?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--require-all=yes"], "--require-all takes no value; leave 'yes' out"),
        (["--no-summary=1"], "--summary takes no value; leave '1' out"),
        (["--strategy", "--seed", "1"], "--strategy needs a value after it"),
    ],
)
def test_a_value_too_many_or_too_few_is_an_error(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in _refusal(capsys, *argv)


def test_both_programs_know_all_commands_of_each_other() -> None:
    assert {program: set(commands) for program, commands in COMMANDS.items()} == {
        "python -m fedserver": set(SERVER_COMMANDS),
        "python -m fedclient": set(CLIENT_COMMANDS),
    }


@pytest.mark.parametrize(
    ("settings_class", "other", "commands"),
    [
        (ClientSettings, "python -m fedserver", SERVER_COMMANDS),
        (HistorySettings, "python -m fedclient", CLIENT_COMMANDS),
        (ServerSettings, "python -m fedclient", CLIENT_COMMANDS),
    ],
)
def test_a_command_of_the_other_program_is_named_with_it(
    settings_class: type[Settings],
    other: str,
    commands: Iterable[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in commands:
        with pytest.raises(SystemExit):
            parse(settings_class, [command, "--last", "3"])
        assert f"{command} is a command of {other}; type" in capsys.readouterr().err


def test_the_error_of_a_command_after_a_flag_says_where_it_belongs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "comes before all flags: python -m fedserver history" in _refusal(
        capsys, "--seed", "1", "history"
    )


@pytest.mark.parametrize("flag", ["--server", "--proxy", "--task"])
def test_bytes_that_are_not_utf_8_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a flag reaches Python with a surrogate for each undecodable byte."""
    with pytest.raises(SystemExit):
        parse(ClientSettings, ["--id", "0", flag, os.fsdecode(b"h\xff:5")])
    assert f"{flag} is 'h\\udcff:5': this isn't UTF-8" in capsys.readouterr().err


def test_a_folder_may_have_a_name_that_is_not_utf_8() -> None:
    folder = os.fsdecode(b"h\xff")
    assert parse(ServerSettings, ["--state-dir", folder]).state_dir == Path(folder)


@pytest.mark.parametrize("settings_class", [ServerSettings, ClientSettings])
def test_help_lists_every_setting_with_its_default(
    settings_class: type[ServerSettings | ClientSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    """In groups, and with a description each."""
    with pytest.raises(SystemExit) as ended:
        parse(settings_class, ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    missing = [
        name
        for name, field in settings_class.model_fields.items()
        if f"--{name.replace('_', '-')}" not in shown or not field.description
    ]
    assert missing == []
    assert "(default: cpu)" in shown if settings_class is ClientSettings else "(default: 10)"


@pytest.mark.parametrize(
    ("settings_class", "commands"),
    [(ServerSettings, SERVER_COMMANDS), (ClientSettings, CLIENT_COMMANDS)],
)
def test_help_names_every_command(
    settings_class: type[ServerSettings | ClientSettings],
    commands: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(settings_class, ["--help"])
    shown = capsys.readouterr().out
    assert [name for name in commands if f"`{name}`" not in shown] == []
    assert "dict[" not in shown


def test_a_strategys_parameters_are_one_flag_or_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers by name, the same from either; a word isn't one."""
    config = _toml(tmp_path, 'strategy = "krum"\n[strategy_parameters]\nf = 2\nserver_lr = 0.5\n')
    expected = {"f": 2.0, "server_lr": 0.5}
    assert parse(ServerSettings, ["--config", config]).strategy_parameters == expected
    given = parse(ServerSettings, ["--strategy-parameters", "f=2,server_lr=0.5"])
    assert given.strategy_parameters == expected
    assert given.run_settings()["strategy_parameters"] == expected
    refused = _refusal(capsys, "--strategy-parameters", "f=two")
    assert "f is 'two': input should be a valid number" in refused


def test_the_error_of_parameters_that_arent_pairs_says_how_to_write_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a flag, and in the environment, where they are JSON."""
    refused = _refusal(capsys, "--strategy-parameters", "f")
    assert "--strategy-parameters can't be read; write it as name=value,name=value" in refused
    monkeypatch.setenv("FEDSERVER_STRATEGY_PARAMETERS", "f=2")
    refused = _refusal(capsys)
    assert "FEDSERVER_STRATEGY_PARAMETERS can't be read; write it as JSON" in refused

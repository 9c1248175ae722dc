"""Settings from defaults, a TOML file, the environment and flags, in rising order of precedence.

Each side declares a frozen class derived from `Settings`. `parse` returns a validated value of it,
or ends the process with a sentence and exit code 2.
"""

import argparse
import difflib
import functools
import inspect
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from fedrounds import __version__
from fedrounds.errors import FederationError, InvalidInput, OwnCodeFailed
from fedrounds.plugins import show_error
from fedrounds.times import iso_time

USAGE_EXIT_CODE = 2
COMMANDS: Mapping[str, Sequence[str]] = {
    "python -m fedserver": (
        *("history", "export", "curve", "confusion", "clients", "quarantine", "show"),
        *("strategies", "verify"),
    ),
    "python -m fedclient": ("partitions", "doctor"),
}
"""The commands of both programs: each names the other for a command that isn't its own."""
_NOT_IN_A_FILE = ("config", "print_config")

S = TypeVar("S", bound="Settings")


class Settings(BaseSettings):
    """Everywhere.

    The root of both sides' settings. A class derived from it is a group of them, its docstring's
    first line the heading in --help; the environment's names are PREFIX_NAME in capitals, and
    without an env_prefix there are none.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        env_parse_none_str="none",
    )
    _config_file: ClassVar[Path | None] = None

    config: Path | None = Field(default=None, description="TOML file with any of these settings")
    print_config: bool = Field(
        default=False, description="show each setting and where it came from, then exit"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="lowest level of log lines"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _keep_the_word_none(cls, value: object, info: ValidationInfo) -> object:
        """Keep "none" as a word where it is among the choices; elsewhere it means no value."""
        assert info.field_name is not None
        words = get_args(cls.model_fields[info.field_name].annotation)
        # Older releases of pydantic-settings leave a flag's "none" as it is.
        if value in (None, "none"):
            return "none" if "none" in words else None
        return value

    @field_validator("*")
    @classmethod
    def _refuse_undecodable_text(cls, value: object) -> object:
        """Refuse text of bytes that aren't UTF-8, which no message can hold; a path may be so."""
        if isinstance(value, str) and not _is_encodable(value):
            raise ValueError("this isn't UTF-8; check the encoding of the terminal or the script")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources by precedence, highest first; flags precede all of them.

        Without a prefix a variable such as RUN, SEED or TASK may belong to another program.
        """
        toml = TomlConfigSettingsSource(settings_cls, toml_file=cls._config_file)
        if not settings_cls.model_config.get("env_prefix"):
            return init_settings, toml
        return init_settings, env_settings, toml


def parse(settings_class: type[S], argv: list[str]) -> S:
    """Return the validated settings from `argv`, the environment and the TOML file.

    Ends the process with exit code 2 and a sentence on standard error if a setting is wrong or a
    variable with the side's prefix is no setting, and with 0 after --help and --print-config.
    """
    parser = _Parser(settings_class)
    config_file = _find_config(settings_class, argv)
    try:
        _validate_environment(settings_class)
        if config_file is not None:
            _validate_toml(config_file)
        settings_class._config_file = config_file
        flags: CliSettingsSource[S] = CliSettingsSource(
            settings_class, root_parser=parser, add_argument_method=_Parser.add_setting
        )
        settings = CliApp.run(settings_class, cli_args=argv, cli_settings_source=flags)
    except ValidationError as error:
        origins = _origins(settings_class, flags())
        for sentence in _sentences(error, settings_class, origins):
            print(f"{parser.prog}: {sentence}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None
    except SettingsError as error:
        print(f"{parser.prog}: {_pairs_sentence(str(error), settings_class)}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None
    except FederationError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None
    if settings.print_config:
        print("\n".join(_described(settings, flags())))
        raise SystemExit(0)
    return settings


def _pairs_sentence(message: str, settings_class: type[Settings]) -> str:
    """Return a sentence on how to write the setting of several values that `message` names."""
    in_environment = re.search(r'for field "(\w+)" from source "EnvSettingsSource"', message)
    if in_environment:
        prefix = settings_class.model_config.get("env_prefix") or ""
        name = f"{prefix}{in_environment[1].upper()}"
        return f'{name} can\'t be read; write it as JSON, such as {{"name": 1}}'
    flag = re.search(r"encountered for (\w+)", message)
    name = _flag(flag[1]) if flag else "a setting"
    return f"{name} can't be read; write it as name=value,name=value"


class _Parser(argparse.ArgumentParser):
    """Groups flags by the settings class that declares them; suggests the flag that was meant."""

    def __init__(self, settings_class: type[Settings]) -> None:
        super().__init__(
            prog=settings_class.model_config.get("cli_prog_name"),
            usage="%(prog)s [settings]",
            description=inspect.cleandoc(settings_class.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"fedrounds {__version__}")
        self._settings_class = settings_class
        self._titles: dict[str, argparse._ArgumentGroup] = {}

    def add_setting(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401
        """Add a flag to its group."""
        if options.get("metavar", "").startswith("dict["):
            options["metavar"] = "NAME=VALUE,..."
        title = group_title(self._settings_class, options["dest"].replace("-", "_"))
        if title not in self._titles:
            self._titles[title] = self.add_argument_group(title)
        return self._titles[title].add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with a sentence; for an unknown flag, suggest the nearest flag."""
        _, is_unknown, rest = message.partition("unrecognized arguments: ")
        if is_unknown:
            unknown = rest.split()[0].partition("=")[0]
            if unknown.startswith("-"):
                near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                message = f"there is no flag {unknown}{hint}"
            else:
                message = _wrong_word(unknown, program=self.prog)
        elif wrong := re.fullmatch(r"argument (\S+): (.*)", message):
            flag = wrong[1].rpartition("/--no-")[0] or wrong[1]
            if wrong[2] == "expected one argument":
                message = f"{flag} needs a value after it"
            elif wrong[2].startswith("ignored explicit argument "):
                value = wrong[2].removeprefix("ignored explicit argument ")
                message = f"{flag} takes no value; leave {value} out"
        print(f"{self.prog}: {message} (--help lists all)", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE)


def _wrong_word(word: str, *, program: str) -> str:
    """Return a sentence about a word among the flags of a program, or of a command of it."""
    for known, commands in COMMANDS.items():
        if word not in commands:
            continue
        if known == program:
            return f"{word} is a command, and comes before all flags: {known} {word} ..."
        return f"{word} is a command of {known}; type {known} {word}"
    near = difflib.get_close_matches(word, COMMANDS.get(program, ()), n=1)
    hint = f"did you mean {near[0]}?" if near else "settings are given as --name value"
    return f"there is no command {word}; {hint}"


def group_title(settings_class: type[Settings], name: str) -> str:
    """Return a setting's heading: the first line of the docstring of the class that declares it."""
    for declaring in settings_class.__mro__:
        if name in inspect.get_annotations(declaring):
            if declaring is settings_class:
                return "settings"
            return (declaring.__doc__ or "").splitlines()[0].rstrip(".")
    return "settings"


def _described(settings: Settings, flags: dict[str, Any]) -> list[str]:
    """Return the settings as lines of TOML, each with the source of its value."""
    origins = _origins(type(settings), flags)
    lines = []
    # A settings file can't contain `config` and `print_config`.
    for name, value in settings.model_dump(
        mode="json", by_alias=True, exclude=set(_NOT_IN_A_FILE)
    ).items():
        shown = f"{name} = {json.dumps(value)}" if value is not None else f"# {name} is not set"
        source, _ = origins.get(name, ("default", name))
        lines.append(f"{shown}  # {source}")
    return lines


def _origins(
    settings_class: type[Settings], flags: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return the source of each given setting, and the setting's name there."""
    file = settings_class._config_file
    in_file = TomlConfigSettingsSource(settings_class, toml_file=file)()
    in_environment = _in_environment(settings_class)
    return {
        **{name: (f"{file}", f"in {file}, {name}") for name in in_file},
        **{
            name: (f"environment ({variable})", variable)
            for name, variable in in_environment.items()
        },
        **{name: ("flag", _flag(name)) for name in flags},
    }


def _in_environment(settings_class: type[Settings]) -> dict[str, str]:
    """Return the variables with this side's prefix, by setting."""
    prefix = settings_class.model_config.get("env_prefix")
    if not prefix:
        return {}
    return {
        name[len(prefix) :].lower(): name for name in os.environ if name.upper().startswith(prefix)
    }


def silence_grpc() -> None:
    """Turn off gRPC's own log lines; set GRPC_VERBOSITY to get them.

    Call this before gRPC is imported.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@functools.cache
def stderr_console() -> Console:
    """Return the one console on standard error; a second would write into a live view."""
    return Console(stderr=True)


class _UtcFormatter(logging.Formatter):
    """Writes the time as ISO 8601 with the offset, in UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time of a record to the millisecond."""
        assert datefmt is None
        return iso_time(record.created, timespec="milliseconds")


def _utc(at: datetime) -> str:
    return iso_time(at.timestamp(), timespec="seconds")


def log_to_stderr(level: str) -> None:
    """Send log lines with the time to standard error: coloured in a terminal, plain elsewhere."""
    console = stderr_console()
    if console.is_terminal:
        # It writes above a live view; a plain handler would write into it.
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, log_time_format=lambda at: Text(_utc(at))
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_UtcFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("fedrounds", "fedserver", "fedclient"):
        logging.getLogger(package).setLevel(level)


def print_error(program: str, error: FederationError) -> None:
    """Print an error's sentence on standard error, after the traceback of a task's own code."""
    if isinstance(error, OwnCodeFailed) and error.__cause__ is not None:
        print(show_error(error.__cause__), file=sys.stderr)
    print(f"{program}: {error}", file=sys.stderr)


def _find_config(settings_class: type[Settings], argv: list[str]) -> Path | None:
    """Return the path of the settings file; a flag precedes the environment."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # If its value is missing, the parser of all flags says so.
    finder.add_argument("--config", nargs="?")
    name = _in_environment(settings_class).get("config", "")
    path = finder.parse_known_args(argv)[0].config or os.environ.get(name)
    return Path(path) if path else None


def _validate_environment(settings_class: type[Settings]) -> None:
    given = _in_environment(settings_class)
    for name in given.keys() - settings_class.model_fields.keys():
        prefix = settings_class.model_config.get("env_prefix") or ""
        near = difflib.get_close_matches(name, settings_class.model_fields, n=1)
        hint = f"did you mean {prefix}{near[0].upper()}?" if near else "unset it"
        raise InvalidInput(f"the environment has {given[name]}, which is no setting; {hint}")


def _validate_toml(path: Path) -> None:
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"the settings file {path} can't be read: {error.strerror}") from error
    # Bytes that aren't UTF-8 are no TOML either.
    except ValueError as error:
        raise InvalidInput(f"the settings file {path} is not TOML: {error}") from error
    for name in given:
        if name in _NOT_IN_A_FILE:
            raise InvalidInput(
                f"{name} can't stand in a settings file, as in {path}; give {_flag(name)}"
            )


def _sentences(
    error: ValidationError,
    settings_class: type[Settings],
    origins: Mapping[str, tuple[str, str]],
) -> list[str]:
    """Return a sentence for each setting that is wrong.

    A setting of several types has an error of its own for each of them.
    """
    problems: dict[object, dict[str, Any]] = {}
    for problem in error.errors():
        name, *rest = problem["loc"] or ("",)
        is_plain = name not in settings_class.model_fields or _is_mapping(str(name), settings_class)
        before = problems.setdefault((name, *rest) if is_plain else name, dict(problem))
        if before["msg"] != problem["msg"]:
            before["msg"] += f", or {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return [_sentence(problem, settings_class, origins) for problem in problems.values()]


def _sentence(
    problem: Mapping[str, Any],
    settings_class: type[Settings],
    origins: Mapping[str, tuple[str, str]],
) -> str:
    name, *rest = (str(part) for part in problem["loc"] or ("",))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, settings_class.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"in {settings_class._config_file} there is no setting {name!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    _, called = origins.get(name, ("default", _flag(name)))
    if problem["type"] == "missing":
        return f"{called} is required"
    if _is_mapping(name, settings_class):
        key, *rest = rest
        if rest == ["[key]"]:
            return f"{called} has the name {key!r}: {message[0].lower()}{message[1:]}"
        called = f"{called}: {key}"
    return f"{called} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _is_mapping(name: str, settings_class: type[Settings]) -> bool:
    return get_origin(settings_class.model_fields[name].annotation) is dict


def _is_encodable(text: str) -> bool:
    """Whether a text can be encoded; Python keeps undecodable bytes of a flag as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

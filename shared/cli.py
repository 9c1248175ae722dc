"""Settings from defaults, a TOML file, the environment and flags, in rising order of precedence.

A side declares one frozen class derived from `Settings`; `parse` gives a validated value of it or
ends the process with a sentence and exit code 2.
"""

import argparse
import difflib
import logging
import sys
import tomllib
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from rich.console import Console
from rich.logging import RichHandler

from shared.errors import FederationError, InvalidInput

USAGE_EXIT_CODE = 2

S = TypeVar("S", bound="Settings")


class Settings(BaseSettings):
    """The root of both sides' settings; the environment's names are PREFIX_NAME in capitals."""

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
    log_level: str = Field(
        default="INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="DEBUG, INFO, WARNING or ERROR",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: whoever comes first wins; flags come before all of them."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=cls._config_file)
        return init_settings, env_settings, toml


def parse(settings_class: type[S], argv: list[str]) -> S:
    """Return the validated settings that `argv`, the environment and the TOML file make.

    Ends the process with exit code 2 and a sentence on standard error where one of them is wrong,
    and with 0 after --help.
    """
    prog = settings_class.model_config.get("cli_prog_name")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    config_file = finder.parse_known_args(argv)[0].config
    try:
        if config_file is not None:
            _examine_toml(config_file)
        settings_class._config_file = config_file
        return CliApp.run(settings_class, cli_args=argv)
    except ValidationError as error:
        for problem in error.errors():
            print(f"{prog}: {_sentence(problem, settings_class)}", file=sys.stderr)
    except FederationError as error:
        print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(USAGE_EXIT_CODE)


def log_to_stderr(level: str) -> None:
    """Send log lines to standard error with the time: a person's in a terminal, plain elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        # Writes above a live view, where a plain handler would write into it.
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("shared", "fedserver", "fedclient"):
        logging.getLogger(package).setLevel(level)


def _examine_toml(path: Path) -> None:
    try:
        with path.open("rb") as file:
            tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"the settings file {path} can't be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the settings file {path} is not TOML: {error}") from error


def _sentence(problem: object, settings_class: type[Settings]) -> str:
    assert isinstance(problem, dict)
    name = ".".join(str(part) for part in problem["loc"])
    flag = "--" + name.replace("_", "-")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, settings_class.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no setting {name!r}{hint}"
    if problem["type"] == "missing":
        return f"{flag} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    return f"{flag} is {problem['input']!r}: {message[0].lower()}{message[1:]}"

"""`python -m fedserver strategies`: the rows a strategy is put together from."""

import inspect

from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.padding import Padding

from fedserver.strategies import ROWS, Row, parameters_of
from fedserver.strategies.rows import Local, Mixing, ServerOptimizer
from shared.cli import Settings, parse


class StrategiesSettings(Settings):
    """List what --strategy can name, each with a line and its parameters.

    A strategy is one aggregator (fedavg if none is named), before it any steps, behind it a server
    optimizer and a local rule, joined by +: nnm+krum, median+fedadam, fedprox. Parameters are given
    as --strategy-parameters f=2,server_lr=0.03, in TOML as a table; 1 means yes. A row of your own
    is a function in your own module, named package.module:function.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver strategies")


_HEADINGS = {
    Mixing: "steps before a robust aggregator",
    ServerOptimizer: "server optimizers",
    Local: "local rules",
}


def run(argv: list[str]) -> None:
    """Print the table."""
    parse(StrategiesSettings, argv)
    console = Console(highlight=False)
    heading = ""
    for name, row in ROWS.items():
        kind = inspect.signature(row).return_annotation
        before, heading = heading, _HEADINGS.get(kind, "aggregators")
        if heading != before:
            console.print(f"{heading}:", markup=False)
        console.print(Padding(f"{name}: {_line(row)}", (0, 0, 0, 2)), markup=False)
        for key, told in _parameters(row).items():
            console.print(Padding(f"{key}: {told}", (0, 0, 0, 6)), markup=False)


def _line(row: Row) -> str:
    return (inspect.getdoc(row) or "no docstring").splitlines()[0]


def _parameters(row: Row) -> dict[str, str]:
    """Return what a row's docstring says of each parameter, with its default."""
    _, _, section = (inspect.getdoc(row) or "").partition("\nArgs:\n")
    told: dict[str, str] = {}
    key = ""
    for line in section.split("\n\n")[0].splitlines():
        name, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            key, told[name] = name, rest
        elif key:
            told[key] += f" {line.strip()}"
    parameters = parameters_of(row)
    return {key: f"{told.get(key, '')} [{float(one.default):g}]" for key, one in parameters.items()}

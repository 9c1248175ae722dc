"""`python -m fedserver strategies`: the rows a strategy is put together from."""

import inspect

from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedrounds.cli import Settings, parse
from fedrounds.strategies.components import Local, Mixing, ServerOptimizer
from fedrounds.strategies.registry import ROWS, Row, parameters_of


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
    by_heading: dict[str, list[tuple[str, Row]]] = {}
    for name, row in ROWS.items():
        kind = inspect.signature(row, eval_str=True).return_annotation
        by_heading.setdefault(_HEADINGS.get(kind, "aggregators"), []).append((name, row))
    for heading, rows in by_heading.items():
        console.print(f"{heading}:", markup=False)
        for name, row in rows:
            console.print(_entry(name, _line(row), indent=2))
            for key, told in _parameters(row).items():
                console.print(_entry(key, told, indent=6))


def _entry(name: str, told: str, *, indent: int) -> Padding:
    """Return a name and what is told of it, lines that fold set in further than the name."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row(Text(f"{name}:"), Text(told))
    return Padding(table, (0, 0, 0, indent))


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

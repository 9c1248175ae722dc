"""`python -m fedserver strategies`: the components of strategies."""

import inspect

from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedrounds.cli import Settings, parse
from fedrounds.strategies.components import ClientAlgorithm, PreAggregator, ServerOptimizer
from fedrounds.strategies.registry import COMPONENTS, Factory, parameters_of


class StrategiesSettings(Settings):
    """List what --strategy can name, each with a line and its parameters.

    A strategy is one aggregator (default: fedavg). Pre-aggregators go before it, a server optimizer
    and a client algorithm after it, joined by +: nnm+krum, median+fedadam, fedprox. Give parameters
    as --strategy-parameters f=2,server_lr=0.03, in TOML as a table; 1 means yes. A component of
    your own is a function in your own module, named package.module:function.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedserver strategies")


_HEADINGS = {
    PreAggregator: "pre-aggregators, before a robust aggregator",
    ServerOptimizer: "server optimizers",
    ClientAlgorithm: "client algorithms",
}


def run(argv: list[str]) -> None:
    """Print the table."""
    parse(StrategiesSettings, argv)
    console = Console(highlight=False)
    by_heading: dict[str, list[tuple[str, Factory]]] = {}
    for name, factory in COMPONENTS.items():
        kind = inspect.signature(factory, eval_str=True).return_annotation
        by_heading.setdefault(_HEADINGS.get(kind, "aggregators"), []).append((name, factory))
    for heading, components in by_heading.items():
        console.print(f"{heading}:", markup=False)
        for name, factory in components:
            console.print(_entry(name, _first_line(factory), indent=2))
            for key, text in _parameters(factory).items():
                console.print(_entry(key, text, indent=6))


def _entry(name: str, text: str, *, indent: int) -> Padding:
    """Return a name with its description; folded lines are indented further than the name."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row(Text(f"{name}:"), Text(text))
    return Padding(table, (0, 0, 0, indent))


def _first_line(factory: Factory) -> str:
    return (inspect.getdoc(factory) or "no docstring").splitlines()[0]


def _parameters(factory: Factory) -> dict[str, str]:
    """Return the description of each parameter, from the docstring, with its default."""
    _, _, section = (inspect.getdoc(factory) or "").partition("\nArgs:\n")
    descriptions: dict[str, str] = {}
    key = ""
    for line in section.split("\n\n")[0].splitlines():
        name, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            key, descriptions[name] = name, rest
        elif key:
            descriptions[key] += f" {line.strip()}"
    return {
        key: f"{descriptions.get(key, '')} [{float(parameter.default):g}]"
        for key, parameter in parameters_of(factory).items()
    }

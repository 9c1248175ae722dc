"""The table of strategies: rows by name, put together, and refused where they make no sense."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedrounds.errors import InvalidInput
from fedrounds.strategies import StrategySettings
from fedrounds.strategies.components import RobustAggregator
from fedrounds.strategies.registry import COMPONENTS, find_strategy, parameters_of
from fedserver.commands.strategies import run

SETTINGS = StrategySettings(lr=0.1, momentum=0.5, num_partitions=10, evaluate_on_clients=True)


def find(strategy: str, parameters: dict[str, float] | None = None, **changed: Any) -> Any:  # noqa: ANN401
    """Return the strategy that a run's settings name."""
    return find_strategy(strategy, parameters, settings=replace(SETTINGS, **changed))


def last(*, rank: int = -1, of_many: bool = True) -> RobustAggregator:
    """One of each place's values, by rank: a row of somebody's own."""
    assert of_many
    return RobustAggregator(reduce=lambda ascending: ascending[:, rank].astype("float64"))


def picky(*, needed: float) -> RobustAggregator:
    """A row whose parameter has no default."""
    return RobustAggregator(reduce=lambda ascending: ascending[:, 0] * needed)


def bare(*, rank=-1, share=0.5):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """A row without annotations, as people write them."""
    return last(rank=rank) if share == 0.5 else picky(needed=share)


def quoted(*, rank: "int" = -1, needed: "float" = 0.5) -> "RobustAggregator":
    """Annotations that are text, as `from __future__ import annotations` makes them."""
    return last(rank=rank) if needed == 0.5 else picky(needed=needed)


def by_rate(*, settings: StrategySettings) -> RobustAggregator:
    """A row that rests on the run's settings."""
    assert settings.lr == 0.2
    return RobustAggregator(reduce=lambda ascending: ascending[:, 0] * settings.lr)


def wrong() -> int:
    """No row at all."""
    return 3


THIS = "tests.unit.strategies.test_strategies"


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_row_stands_by_itself_and_names_its_paper(name: str) -> None:
    """With its defaults alone it is a strategy; its docstring says what it is and whose."""
    mixes_alone = name in ("nnm", "bucketing")
    assert find(f"{name}+krum" if mixes_alone else name).name.startswith(name)
    text = inspect.getdoc(COMPONENTS[name]) or ""
    assert "et al." in text or "El Mhamdi" in text or name == "uniform"
    for key in parameters_of(COMPONENTS[name]):
        assert f"    {key}: " in text, f"{key} isn't told of"


@pytest.mark.parametrize(
    "name",
    [
        "nnm+krum+fedadam",
        "median+fedyogi",
        "bucketing+nnm+krum",
        "clip",
        "nnm+clip",
        "fednova+fedavgm",
    ],
)
def test_rows_are_put_together(name: str) -> None:
    """Steps, an aggregator, a server optimizer; a step's default aggregator is uniform."""
    strategy = find(name, {"f": 2.0} if "nnm" in name else {})
    assert (strategy.server_optimizer is not None) == ("fed" in name.rpartition("+")[2])


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("fedavgg", {}, "no strategy 'fedavgg'; did you mean 'fedavg'?"),
        ("nnm+", {}, "no strategy ''"),
        ("krum", {"ff": 1}, "krum has no parameter 'ff'; did you mean 'f'?"),
        ("fedavg", {"f": 1}, r"no parameter 'f' \(it has: none\)"),
        ("krum", {"f": 1.5}, "f of strategy krum is 1.5; it must be a whole number"),
        ("fedavgm", {"nesterov": 2}, "nesterov of strategy fedavgm is 2; it must be 0 or 1"),
        ("krum", {"f": -1}, "f is -1; it must be 0 or more bad updates"),
        ("trimmed-mean", {"trim": 0.5}, "below 0.5"),
        ("fedadam", {"beta1": 1}, "beta1 is 1; it must be from 0 to below 1"),
        ("krum+median", {}, "more than one aggregator; name one"),
        ("fedadam+fedyogi", {}, "more than one server optimizer; name one"),
        ("krum+nnm", {}, "pre-aggregators such as nnm come first"),
        ("fedadam+krum", {}, "then one aggregator, then a server optimizer"),
        ("nnm+fedavg", {}, "no single client's update, so a mean can't weigh it"),
        ("clip+fednova", {}, "use uniform or a robust aggregator instead"),
        ("nnm", {}, r"out of nnm can still be bad; .* such as nnm\+krum or nnm\+median"),
        ("nnm+bucketing+fedadam", {}, "out of bucketing can still be bad"),
        ("no.such:row", {}, "importing no.such failed"),
        ("nosuch", {}, r"there is no strategy 'nosuch'\. There are: fedavg, "),
        (".x:row", {}, "'.x' is no module's name"),
        (f"{THIS}:missing", {}, "has no missing"),
        (f"{THIS}:THIS", {}, "is a str; name a function"),
        (f"{THIS}:wrong", {}, "gives a int; its function must return a WeightedAggregator"),
        (f"{THIS}:picky", {}, "needs its parameter 'needed'"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    name: str, parameters: dict[str, float], words: str
) -> None:
    """It says what is wrong and what to type."""
    with pytest.raises(InvalidInput, match=words):
        find(name, parameters)


def test_the_error_of_a_row_whose_module_fails_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AttributeError of the module's own isn't taken for a row that is missing."""
    (tmp_path / "bad_rows.py").write_text("import math\nmath.tua\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"importing bad_rows raised AttributeError: .*'tua'.* \(bad_rows.py, line 2\)"
    with pytest.raises(InvalidInput, match=message):
        find("bad_rows:row", {})


def test_what_a_row_rests_on_must_be_set() -> None:
    """q-FedAvg needs the clients' losses, FedNova local SGD."""
    with pytest.raises(InvalidInput, match="add --evaluate-on-clients"):
        find("qfedavg", evaluate_on_clients=False)
    with pytest.raises(InvalidInput, match="give --optimizer sgd"):
        find("fednova", optimizer="adam")


def test_a_users_own_row_is_named_by_its_module() -> None:
    """With its parameters, alone or beside rows of the table."""
    strategy = find(f"nnm+{THIS}:last+fedadam", {"rank": 0, "of_many": 1, "f": 2, "tau": 0.1})
    assert strategy.min_updates == 5
    with pytest.raises(InvalidInput, match="did you mean 'rank'"):
        find(f"{THIS}:last", {"rnak": 0})
    assert find(f"{THIS}:bare", {"share": 0.25})
    assert find(f"{THIS}:quoted", {"needed": 0.25, "rank": 0})
    assert find(f"{THIS}:by_rate", lr=0.2)
    with pytest.raises(InvalidInput, match=r"rank of strategy .* must be a whole number"):
        find(f"{THIS}:quoted", {"rank": 0.5})


def test_the_command_describes_every_component_and_parameter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each by its name, a line and its defaults."""
    run([])
    output = " ".join(capsys.readouterr().out.split())
    for name, factory in COMPONENTS.items():
        assert f" {name}: " in output
        assert " ".join((inspect.getdoc(factory) or "").splitlines()[0].split()) in output
    assert "trim: share of the values to drop at each end, rounded down. [0.2]" in output
    assert "tau: degree of adaptivity; smaller values adapt more. [0.001]" in output

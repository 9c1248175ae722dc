"""What the server makes of a cohort's updates: the table of all rows, and how they are combined.

A strategy is named by its rows: steps before a robust rule, the aggregator, a server optimizer, a
local rule, in this order and joined by "+", such as nnm+krum or median+fedadam+fedprox. Without an
aggregator it is fedavg, or uniform: after clip, since what comes out of a step has no num_examples,
and before local rules of which the paper has it so.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedrounds.errors import InvalidInput
from fedrounds.plugins import import_own
from fedrounds.strategies import (
    fedbuff,
    local_rules,
    means,
    pre_aggregators,
    robust,
    server_optimizers,
)
from fedrounds.strategies.components import (
    Local,
    Mean,
    Mixing,
    Part,
    Rule,
    ServerOptimizer,
    Strategy,
)
from fedrounds.strategies.server_step import by_rule

Row = Callable[..., Part]

ROWS: Mapping[str, Row] = {
    "fedavg": means.fedavg,
    "uniform": robust.uniform,
    "qfedavg": means.qfedavg,
    "fednova": means.fednova,
    "fedbuff": fedbuff.fedbuff,
    "median": robust.median,
    "trimmed-mean": robust.trimmed_mean,
    "krum": robust.krum,
    "multi-krum": robust.multi_krum,
    "geometric-median": robust.geometric_median,
    "centered-clipping": robust.centered_clipping,
    "bulyan": robust.bulyan,
    "clip": pre_aggregators.clip,
    "nnm": pre_aggregators.nnm,
    "bucketing": pre_aggregators.bucketing,
    "fedavgm": server_optimizers.fedavgm,
    "fedadagrad": server_optimizers.fedadagrad,
    "fedadam": server_optimizers.fedadam,
    "fedyogi": server_optimizers.fedyogi,
    "fedprox": local_rules.fedprox,
    "scaffold": local_rules.scaffold,
    "feddyn": local_rules.feddyn,
    "fedbn": local_rules.fedbn,
    "ditto": local_rules.ditto,
}


def find_strategy(settings: Mapping[str, Any]) -> Strategy:
    """Return the strategy that a run's settings name.

    They are `strategy`, `strategy_parameters` (numbers by name, of all its rows together) and what
    single rows rest on. Naming `package.module:row` imports the module, that is, runs its code.

    Raises:
        InvalidInput: there is no such row or parameter, a number is out of range, or the rows make
            no sense together.
    """
    name = settings["strategy"]
    given = dict(settings.get("strategy_parameters") or {})
    rows = [(one, _find_row(one)) for one in name.split("+")]
    known = {key for _, row in rows for key in parameters_of(row)}
    for key in given.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise InvalidInput(
            f"strategy {name} has no parameter {key!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (it has: {', '.join(sorted(known)) or 'none'})"
        )
    parts = [_made(one, row, given, settings) for one, row in rows]
    return _composed(name, parts)


def parameters_of(row: Row) -> dict[str, inspect.Parameter]:
    """Return what can be chosen of a row, by name."""
    parameters = inspect.signature(row, eval_str=True).parameters
    return {key: one for key, one in parameters.items() if key != "settings"}


def _find_row(name: str) -> Row:
    if name in ROWS:
        return ROWS[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(name, ROWS, n=1)
        raise InvalidInput(
            f"there is no strategy {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(ROWS)}, joined by +; one of your own is named "
            "package.module:function. `python -m fedserver strategies` tells of each"
        )
    module = import_own(f"strategy {name!r}", module_name)
    if not hasattr(module, attribute):
        raise InvalidInput(f"strategy {name!r}: {module_name} has no {attribute}")
    found = getattr(module, attribute)
    if not callable(found):
        raise InvalidInput(
            f"strategy {name!r} is a {type(found).__name__}; name a function that returns a row "
            "(see fedrounds.strategies.components)"
        )
    row: Row = found
    return row


def _made(name: str, row: Row, given: Mapping[str, float], settings: Mapping[str, Any]) -> Part:
    """Call a row's function with its own of the given parameters."""
    arguments: dict[str, Any] = {}
    for key, parameter in parameters_of(row).items():
        if key in given:
            arguments[key] = _number(name, parameter, given[key])
        elif parameter.default is inspect.Parameter.empty:
            raise InvalidInput(
                f"strategy {name} needs its parameter {key!r}; give --strategy-parameters {key}=..."
            )
    if "settings" in inspect.signature(row).parameters:
        arguments["settings"] = settings
    part = row(**arguments)
    if not isinstance(part, Part):
        raise InvalidInput(
            f"strategy {name!r} gives a {type(part).__name__}; its function must return a Mean, "
            "Rule, Mixing, ServerOptimizer or Local of fedrounds.strategies.components"
        )
    return part


def _number(name: str, parameter: inspect.Parameter, value: float) -> float | int | bool:
    if parameter.annotation in (float, inspect.Parameter.empty):
        return value
    is_switch = parameter.annotation is bool
    if value != int(value) or (is_switch and value not in (0, 1)):
        raise InvalidInput(
            f"{parameter.name} of strategy {name} is {value:g}; it must be "
            + ("0 or 1" if is_switch else "a whole number")
        )
    return bool(value) if is_switch else int(value)


def _composed(name: str, parts: list[Part]) -> Strategy:
    """Put the rows together, if they stand in an order that makes sense."""
    places = {Mixing: 0, ServerOptimizer: 2, Local: 3}
    order = [places.get(type(part), 1) for part in parts]
    if order != sorted(order):
        raise InvalidInput(
            f"strategy {name}: steps such as nnm come first, then one aggregator, then a server "
            "optimizer, then a local rule"
        )
    for kind, what in ((1, "aggregator"), (2, "server optimizer"), (3, "local rule")):
        if order.count(kind) > 1:
            raise InvalidInput(f"strategy {name} has more than one {what}; name one")
    mixings = [part for part in parts if isinstance(part, Mixing)]
    optimizer = local = None
    named: Part | None = None
    for part in parts:
        if isinstance(part, Mean | Rule):
            named = part
        elif isinstance(part, ServerOptimizer):
            optimizer = part
        elif isinstance(part, Local):
            local = part
    counts_all_the_same = bool(mixings)
    if local is not None:
        counts_all_the_same |= local.only_behind is not None
        _examine_local(name, local)
    if mixings and named is None and not any(one.bounds_updates for one in mixings):
        last = name.split("+")[len(mixings) - 1]
        raise InvalidInput(
            f"strategy {name}: what comes out of {last} can still be bad; name a rule after it "
            f"that bears bad updates, such as {last}+krum or {last}+median"
        )
    aggregator = named or (robust.uniform() if counts_all_the_same else means.fedavg())
    if isinstance(aggregator, Mean):
        if mixings:
            raise InvalidInput(
                f"strategy {name}: what comes out of a step is nobody's update, so a mean can't "
                "weigh it by what its client says; use uniform or a robust rule instead"
            )
        return Strategy(
            name=name,
            aggregator=aggregator.aggregator,
            server_optimizer=optimizer,
            local=local,
            buffer_size=aggregator.buffer_size,
            lacks=aggregator.lacks,
        )
    assert isinstance(aggregator, Rule)
    min_updates = aggregator.min_updates
    for one in reversed(mixings):
        min_updates = one.min_updates(min_updates)
    return Strategy(
        name=name,
        aggregator=by_rule([one.step for one in mixings], aggregator),
        server_optimizer=optimizer,
        local=local,
        min_updates=min_updates,
    )


def _examine_local(name: str, local: Local) -> None:
    """Refuse rows that a local rule, the strategy's last one, makes no sense behind."""
    *before, last = name.split("+")
    if local.only_behind is not None and (
        wrong := [one for one in before if one not in local.only_behind]
    ):
        raise InvalidInput(
            f"strategy {name}: {last} says itself what the server does with the plain mean of "
            f"the updates, so {wrong[0]} makes no sense with it; put it after "
            f"{' or '.join(sorted(local.only_behind))} or alone"
        )
    for one in before:
        if reason := local.not_behind.get(one):
            raise InvalidInput(f"strategy {name}: {last} makes no sense with {one}: {reason}")

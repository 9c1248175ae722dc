"""The table of all components of strategies, and how a name becomes a strategy.

A strategy's name joins the names of its components by "+", in this order: pre-aggregators, one
aggregator, a server optimizer, a client algorithm. Examples: nnm+krum, median+fedadam+fedprox. The
default aggregator is fedavg. It is uniform after clip, since the output of a pre-aggregator has no
num_examples, and before client algorithms whose paper weights all clients the same.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from fedrounds.errors import InvalidInput
from fedrounds.plugins import import_own
from fedrounds.strategies import (
    client_algorithms,
    fedbuff,
    means,
    pre_aggregators,
    robust,
    server_optimizers,
)
from fedrounds.strategies.components import (
    ClientAlgorithm,
    Component,
    PreAggregator,
    RobustAggregator,
    ServerOptimizer,
    Strategy,
    StrategySettings,
    WeightedAggregator,
)
from fedrounds.strategies.server_step import map_and_reduce

Factory = Callable[..., Component]
"""A function with keyword parameters that returns a component of a strategy."""

COMPONENTS: Mapping[str, Factory] = {
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
    "fedprox": client_algorithms.fedprox,
    "scaffold": client_algorithms.scaffold,
    "feddyn": client_algorithms.feddyn,
    "fedbn": client_algorithms.fedbn,
    "ditto": client_algorithms.ditto,
}


_DEFAULT_SETTINGS = StrategySettings()


def find_strategy(
    name: str,
    parameters: Mapping[str, float] | None = None,
    *,
    settings: StrategySettings = _DEFAULT_SETTINGS,
) -> Strategy:
    """Return the strategy of this name, such as nnm+krum, with these parameters by name.

    The parameters are those of all its components together. A name `package.module:function`
    imports that module, which runs its code.

    Raises:
        InvalidInput: there is no such component or parameter, a number is out of range, the
            components don't go together, or the settings aren't what a component needs.
    """
    values = dict(parameters or {})
    factories = [(part, _find_factory(part)) for part in name.split("+")]
    known = {key for _, factory in factories for key in parameters_of(factory)}
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise InvalidInput(
            f"strategy {name} has no parameter {key!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (it has: {', '.join(sorted(known)) or 'none'})"
        )
    components = [_make(part, factory, values, settings) for part, factory in factories]
    return _compose(name, components)


def parameters_of(factory: Factory) -> dict[str, inspect.Parameter]:
    """Return the parameters of a component that a user may choose, by name."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    return {key: parameter for key, parameter in parameters.items() if key != "settings"}


def _find_factory(name: str) -> Factory:
    if name in COMPONENTS:
        return COMPONENTS[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(name, COMPONENTS, n=1)
        raise InvalidInput(
            f"there is no strategy {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(COMPONENTS)}, joined by +; one of your own is named "
            "package.module:function. `python -m fedserver strategies` describes each"
        )
    module = import_own(f"strategy {name!r}", module_name)
    if not hasattr(module, attribute):
        raise InvalidInput(f"strategy {name!r}: {module_name} has no {attribute}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise InvalidInput(
            f"strategy {name!r} is a {type(factory).__name__}; name a function that returns a "
            "component (see fedrounds.strategies.components)"
        )
    return cast(Factory, factory)


def _make(
    name: str, factory: Factory, values: Mapping[str, float], settings: StrategySettings
) -> Component:
    """Call a component's function with those of the values that are its parameters."""
    arguments: dict[str, Any] = {}
    for key, parameter in parameters_of(factory).items():
        if key in values:
            arguments[key] = _number(name, parameter, values[key])
        elif parameter.default is inspect.Parameter.empty:
            raise InvalidInput(
                f"strategy {name} needs its parameter {key!r}; give --strategy-parameters {key}=..."
            )
    if "settings" in inspect.signature(factory).parameters:
        arguments["settings"] = settings
    component = factory(**arguments)
    if not isinstance(component, Component):
        raise InvalidInput(
            f"strategy {name!r} gives a {type(component).__name__}; its function must return a "
            "WeightedAggregator, RobustAggregator, PreAggregator, ServerOptimizer or "
            "ClientAlgorithm of fedrounds.strategies"
        )
    return component


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


def _compose(name: str, components: list[Component]) -> Strategy:
    """Return the strategy of these components.

    Raises:
        InvalidInput: their order makes no sense, or they don't go together.
    """
    positions = {PreAggregator: 0, ServerOptimizer: 2, ClientAlgorithm: 3}
    order = [positions.get(type(component), 1) for component in components]
    if order != sorted(order):
        raise InvalidInput(
            f"strategy {name}: pre-aggregators such as nnm come first, then one aggregator, then a "
            "server optimizer, then a client algorithm"
        )
    for position, kind in ((1, "aggregator"), (2, "server optimizer"), (3, "client algorithm")):
        if order.count(position) > 1:
            raise InvalidInput(f"strategy {name} has more than one {kind}; name one")
    pre_steps = [component for component in components if isinstance(component, PreAggregator)]
    optimizer: ServerOptimizer | None = None
    algorithm: ClientAlgorithm | None = None
    named: WeightedAggregator | RobustAggregator | None = None
    for component in components:
        if isinstance(component, WeightedAggregator | RobustAggregator):
            named = component
        elif isinstance(component, ServerOptimizer):
            optimizer = component
        elif isinstance(component, ClientAlgorithm):
            algorithm = component
    is_uniform = bool(pre_steps)
    if algorithm is not None:
        is_uniform |= algorithm.only_behind is not None
        _validate_predecessors(name, algorithm)
    if pre_steps and named is None and not any(step.bounds_updates for step in pre_steps):
        last = name.split("+")[len(pre_steps) - 1]
        raise InvalidInput(
            f"strategy {name}: what comes out of {last} can still be bad; name a robust aggregator "
            f"after it, such as {last}+krum or {last}+median"
        )
    aggregator = named or (robust.uniform() if is_uniform else means.fedavg())
    if isinstance(aggregator, WeightedAggregator):
        if pre_steps:
            raise InvalidInput(
                f"strategy {name}: what comes out of a pre-aggregator is no single client's "
                "update, so a mean can't weigh it by what its client reports; use uniform or a "
                "robust aggregator instead"
            )
        return Strategy(
            name=name,
            aggregator=aggregator.aggregator,
            server_optimizer=optimizer,
            client_algorithm=algorithm,
            buffer_size=aggregator.buffer_size,
            unmet=aggregator.unmet,
        )
    min_updates = aggregator.min_updates
    for step in reversed(pre_steps):
        min_updates = step.min_updates(min_updates)
    return Strategy(
        name=name,
        aggregator=map_and_reduce([step.linear_map for step in pre_steps], aggregator),
        server_optimizer=optimizer,
        client_algorithm=algorithm,
        min_updates=min_updates,
    )


def _validate_predecessors(name: str, algorithm: ClientAlgorithm) -> None:
    """Refuse components that don't go before the client algorithm, the strategy's last part."""
    *before, last = name.split("+")
    if algorithm.only_behind is not None and (
        wrong := [part for part in before if part not in algorithm.only_behind]
    ):
        raise InvalidInput(
            f"strategy {name}: {last} says itself what the server does with the plain mean of "
            f"the updates, so {wrong[0]} makes no sense with it; put it after "
            f"{' or '.join(sorted(algorithm.only_behind))} or alone"
        )
    for part in before:
        if reason := algorithm.not_behind.get(part):
            raise InvalidInput(f"strategy {name}: {last} makes no sense with {part}: {reason}")

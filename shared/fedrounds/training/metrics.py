"""Metrics over a data set: made anew for each evaluation, given every batch, computed at the end.

Their mean over batches would be another number: the F1 of a batch in which a class is missing says
nothing. A metric here is anything with `update(outputs, targets)` and `compute()`, which every
torchmetrics.Metric has. torchmetrics takes seconds to import, so nothing here imports it: a task's
own factory does.

A metric whose whole state is sums of a fixed shape (accuracy, F1, a confusion matrix, AUC with
thresholds, R2) can be pooled: the sums of all clients' states give the metric over all examples of
all clients, and no example leaves a client. A state that holds predictions stays where it is, and
only its value is reported.
"""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from fedrounds.errors import InvalidInput
from fedrounds.types import MAX_METRIC, MAX_SUMS

logger = logging.getLogger(__name__)


class Metric(Protocol):
    """A metric of one data set, such as a torchmetrics.Metric."""

    def update(self, outputs: Any, targets: Any, /) -> None:  # noqa: ANN401
        """Take a batch's main output and its targets into the metric's state."""

    def compute(self) -> Any:  # noqa: ANN401
        """Return the metric of all batches so far, one number."""


MetricFactory = Callable[[], Metric]
"""Makes a metric that has seen nothing yet, such as `lambda: torchmetrics.F1Score(...)`."""

NO_METRICS: Mapping[str, MetricFactory] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class PooledMetric:
    """A metric of many clients.

    `is_pooled`: it is that of all their examples together; else it is the mean over the
    `num_clients` clients that report it. `value` is None where it can't be computed.
    """

    value: float | None
    is_pooled: bool
    num_clients: int


def make_metrics(
    factories: Mapping[str, MetricFactory], device: str | torch.device = "cpu"
) -> dict[str, Metric]:
    """Return new metrics on a device, by name.

    Raises:
        InvalidInput: a factory doesn't return a metric.
    """
    metrics = {}
    for name, factory in factories.items():
        metric: Any = factory()
        if not callable(getattr(metric, "update", None)) or not callable(
            getattr(metric, "compute", None)
        ):
            raise InvalidInput(
                f"metric {name!r}: its factory returned a {type(metric).__name__}; it must return "
                "an object with update(outputs, targets) and compute(), such as a "
                'torchmetrics.Metric; write {"f1": lambda: torchmetrics.F1Score(...)}'
            )
        metrics[name] = metric.to(device) if hasattr(metric, "to") else metric
    return metrics


def metric_value(name: str, metric: Metric) -> float:
    """Return what a metric has computed.

    Raises:
        InvalidInput: it isn't a single number.
    """
    value = metric.compute()
    if isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)  # type: ignore[arg-type]  # a Number that is no complex
    kind = (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
    raise InvalidInput(
        f"metric {name!r} computed {kind}; it must compute one number, as a tensor of one element "
        "or a Python number"
    )


def sums_of(metric: Metric) -> dict[str, Tensor] | None:
    """Return the state of a metric by the names of its parts; None if it can't be pooled.

    It can if it is a torchmetrics.Metric, and all of its state is tensors whose reduction is "sum",
    of at most MAX_SUMS values together.
    """
    torchmetrics: Any = sys.modules.get("torchmetrics")
    if torchmetrics is None or not isinstance(metric, torchmetrics.Metric):
        return None
    states: dict[str, Tensor] = metric.metric_state
    reductions = metric._reductions  # there is no public name for it
    is_sum = torchmetrics.utilities.data.dim_zero_sum
    are_sums = all(
        isinstance(state, Tensor) and reductions[part] is is_sum for part, state in states.items()
    )
    # Without `full_state_update = False` torchmetrics itself refuses to merge two states.
    if not states or not are_sums or metric.full_state_update is not False:
        return None
    return states if sum(state.numel() for state in states.values()) <= MAX_SUMS else None


def measurements_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[float, ...]]:
    """Return what a client reports of its metrics, by names as in `measurement_sizes`.

    A value that isn't a finite number, or too large a number to be reported, is left out.
    """
    measurements: dict[str, tuple[float, ...]] = {}
    for name, metric in metrics.items():
        sums = sums_of(metric)
        if sums is None:
            measurements[name] = (metric_value(name, metric),)
        else:
            for part, state in sums.items():
                values = state.detach().cpu().double().flatten().tolist()
                measurements[_part_name(name, part)] = tuple(values)
    return {
        name: values
        for name, values in measurements.items()
        if all(abs(value) <= MAX_METRIC for value in values)
    }


def measurement_sizes(factories: Mapping[str, MetricFactory]) -> dict[str, int]:
    """Return how many numbers a client reports under each name.

    "f1/tp" are the sums `tp` in the state of the metric f1, "auc" is the value of a metric that
    can't be pooled.
    """
    sizes = {}
    for name, metric in make_metrics(factories).items():
        sums = sums_of(metric)
        if sums is None:
            sizes[name] = 1
        else:
            sizes |= {_part_name(name, part): state.numel() for part, state in sums.items()}
    return sizes


def pool(
    factories: Mapping[str, MetricFactory],
    reported: Sequence[Mapping[str, Sequence[float]]],
) -> dict[str, PooledMetric]:
    """Return each metric of the clients that `reported` it; each item is one client's report."""
    pooled = {}
    for name, metric in make_metrics(factories).items():
        sums = sums_of(metric)
        parts = [name] if sums is None else [_part_name(name, part) for part in sums]
        reports = [report for report in reported if all(part in report for part in parts)]
        if not reports:
            continue
        value: float | None
        if sums is None:
            value = math.fsum(report[name][0] for report in reports) / len(reports)
        else:
            totals = {
                part: torch.tensor(
                    [
                        math.fsum(values)
                        for values in zip(
                            *(report[_part_name(name, part)] for report in reports), strict=True
                        )
                    ],
                    dtype=torch.float64,
                )
                .reshape(state.shape)
                .to(state.dtype)
                for part, state in sums.items()
            }
            value = _value_of_sums(name, metric, totals)
        pooled[name] = PooledMetric(
            value=value, is_pooled=sums is not None, num_clients=len(reports)
        )
    return pooled


def _value_of_sums(name: str, metric: Any, totals: Mapping[str, Tensor]) -> float | None:  # noqa: ANN401
    """Return what a metric computes from sums that clients report; None if it can't."""
    metric.merge_state(dict(totals))
    try:
        with warnings.catch_warnings():
            # That `update` was never called is true, and is meant.
            warnings.simplefilter("ignore")
            value = metric_value(name, metric)
    except Exception:
        # The sums are what clients say: no sum that one of them makes up may end the run.
        logger.warning("metric %r can't be computed from the clients' sums", name, exc_info=True)
        return None
    return value if math.isfinite(value) else None


def _part_name(name: str, part: str) -> str:
    return f"{name}/{part}"

"""How good a global model is on its clients, by what they report with their updates."""

import statistics
from collections.abc import Mapping, Sequence

from fedrounds.training.metrics import NO_METRICS, MetricFactory, pool
from fedrounds.types import ClientUpdate
from fedserver.events import event_of
from fedserver.records import Attempt, ClientEvaluation, Event


def summarise_clients(
    updates: Sequence[ClientUpdate],
    *,
    holdout: float,
    metrics: Mapping[str, MetricFactory] = NO_METRICS,
) -> ClientEvaluation | None:
    """Return the clients' evaluation of a round's base model, None if no client evaluated it.

    Clients are compared by accuracy, or by loss where none reports an accuracy. `metrics` are the
    task's own.
    """
    has_accuracy = any("global_accuracy" in update.metrics for update in updates)
    compared = "global_accuracy" if has_accuracy else "global_loss"
    reported = [update for update in updates if compared in update.metrics]
    if not reported:
        return None
    values = [update.metrics[compared] for update in reported]
    losses = [update.metrics.get("global_loss") for update in reported]
    sizes = [
        update.metrics.get("global_examples", float(update.num_examples)) for update in reported
    ]
    finite_losses = [loss for loss in losses if loss is not None]
    ascending = sorted(values)
    worst_first = ascending if has_accuracy else ascending[::-1]
    pooled = pool(metrics, [update.measurements for update in reported])
    return ClientEvaluation(
        accuracy=statistics.fmean(values, sizes) if has_accuracy else None,
        mean=statistics.fmean(ascending),
        worst_decile=statistics.fmean(worst_first[: max(1, len(ascending) // 10)]),
        std=statistics.pstdev(ascending),
        minimum=ascending[0],
        quartile_1=_quantile(ascending, 0.25),
        median=_quantile(ascending, 0.5),
        quartile_3=_quantile(ascending, 0.75),
        maximum=ascending[-1],
        num_clients=float(len(reported)),
        num_examples=sum(sizes),
        holdout=holdout,
        loss=(
            statistics.fmean(finite_losses, sizes) if len(finite_losses) == len(losses) else None
        ),
        metrics={name: metric.value for name, metric in pooled.items()},
        means_over_clients=tuple(name for name, metric in pooled.items() if not metric.is_pooled),
    )


def client_evaluation_events(asked: Attempt, evaluation: ClientEvaluation | None) -> list[Event]:
    """Return the event of the clients' evaluation of a round's base model, or None."""
    if evaluation is None:
        return []
    return [
        event_of(
            "evaluated-on-clients",
            asked,
            of_round=asked.round_number - 1,
            spread_of=evaluation.spread_of,
            mean=evaluation.mean,
            worst_decile=evaluation.worst_decile,
            std=evaluation.std,
            clients=int(evaluation.num_clients),
        )
    ]


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the others lie, between two of them linearly."""
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])

"""How good a global model is on its clients, and how differently good: what they said of it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedrounds.types import ClientUpdate
from fedserver.events import event_of
from fedserver.records import Event, Round


def summarise_clients(
    updates: Sequence[ClientUpdate], *, holdout: float
) -> dict[str, float] | None:
    """Return how good a round's base model is on its clients, None if they weren't asked.

    accuracy and loss are means weighted by the examples it was measured on: those of all clients in
    one heap. In the rest each client counts the same: mean; worst_decile, the mean over the tenth
    of the clients (rounded down, at least one) where it is lowest; std, the standard deviation of
    exactly these clients; minimum, quartile_1, median, quartile_3, maximum (between two clients
    linearly). num_clients and num_examples say of how many, `holdout` which share of their examples
    clients never train on and were asked about; 0: they were asked about those they train on.
    """
    told = [one for one in updates if "global_accuracy" in one.metrics]
    if not told:
        return None
    accuracies = sorted(one.metrics["global_accuracy"] for one in told)
    sizes = [one.metrics.get("global_examples", float(one.num_examples)) for one in told]
    found = {
        "accuracy": statistics.fmean((one.metrics["global_accuracy"] for one in told), sizes),
        "mean": statistics.fmean(accuracies),
        "worst_decile": statistics.fmean(accuracies[: max(1, len(accuracies) // 10)]),
        "std": statistics.pstdev(accuracies),
        "minimum": accuracies[0],
        "quartile_1": _quantile(accuracies, 0.25),
        "median": _quantile(accuracies, 0.5),
        "quartile_3": _quantile(accuracies, 0.75),
        "maximum": accuracies[-1],
        "num_clients": float(len(told)),
        "num_examples": sum(sizes),
        "holdout": holdout,
    }
    if all("global_loss" in one.metrics for one in told):
        found["loss"] = statistics.fmean((one.metrics["global_loss"] for one in told), sizes)
    return found


def client_events(asked: Round, summary: Mapping[str, Any] | None) -> list[Event]:
    """Return what is to be heard of a summary: of the model of which round, and how good it is."""
    if summary is None:
        return []
    return [
        event_of(
            "evaluated-on-clients",
            asked,
            of_round=asked.round_number - 1,
            **{name: summary[name] for name in ("mean", "worst_decile", "std")},
            clients=int(summary["num_clients"]),
        )
    ]


def told_of_models(history: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Return for each round whose model clients were asked about the attempt that asked them.

    That is one at the next round: clients say how good a model is when they begin to train from it.
    The last model of a run is begun with by nobody; 0 stands for the first one.
    """
    models = {one["round"]: one["model_digest"] for one in history if one["phase"] == "DONE"}
    return {
        one["round"] - 1: one
        for one in history
        if one["client_evaluation"]
        and (one["round"] == 1 or models.get(one["round"] - 1) == one["base_digest"])
    }


def spread_text(summary: Mapping[str, float]) -> str:
    """Return a summary in a sentence: how good, how even, and on what that was measured."""
    share = summary["holdout"]
    measured = f"on {share:.0%} of each one's examples, held out" if share else "on what they train"
    return (
        f"mean {summary['mean']:.4f}, worst tenth {summary['worst_decile']:.4f}, standard "
        f"deviation {summary['std']:.4f}, quartiles {summary['quartile_1']:.4f} to "
        f"{summary['quartile_3']:.4f} ({measured})"
    )


def _quantile(ascending: Sequence[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])

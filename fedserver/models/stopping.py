"""Whether a run is good enough to stop before its last round. A function of its evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedserver.records import ModelEvaluation
from fedserver.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """The round after which a run stops, and the reason in words."""

    round_number: int
    reason: str


def early_stop(
    settings: ServerSettings, evaluations: Mapping[int, ModelEvaluation]
) -> EarlyStop | None:
    """Return where the run stops, None if it goes on.

    `evaluations` are of the models of DONE rounds that aren't bad, by round. Each is judged by
    itself and by those before it, in order: a server that starts again stops at the same round.
    """
    bound, goal = settings.bound, settings.goal
    best: tuple[int, float] | None = None
    for number in sorted(evaluations):
        numbers = evaluations[number].numbers
        reached = None if bound is None else numbers.get(bound.name)
        if bound is not None and reached is not None and bound.is_passed_by(reached):
            return EarlyStop(
                round_number=number,
                reason=f"{bound.name} {reached:.4g} of round {number} passes --stop-when {bound}",
            )
        value = numbers.get(goal.name)
        if value is not None and (best is None or goal.prefers(value, to=best[1])):
            best = number, value
        if settings.patience and best is not None and number - best[0] >= settings.patience:
            return EarlyStop(
                round_number=number,
                reason=f"no model was better by {goal} than that of round {best[0]} "
                f"({best[1]:.4g}) for {number - best[0]} rounds (--patience {settings.patience})",
            )
    return None

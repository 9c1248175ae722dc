"""The settings of how models are measured, and of what follows from it."""

from typing import Self

from pydantic import Field, field_validator

from fedrounds.cli import Settings
from fedrounds.goals import LOWEST_LOSS, Bound, Goal, parse_bound, parse_goal
from fedrounds.types import MAX_INT32


class GoalSettings(Settings):
    """Which model is best, and when the run stops early, by the held-out set."""

    best_by: str | None = Field(
        default=None,
        description="the number of the held-out set that tells the best model, and whether its "
        "largest or smallest value is best, such as f1:max; none: as the task says, mostly "
        "loss:min",
    )
    stop_when: str | None = Field(
        default=None,
        description="end the run after the first round whose model passes this, such as "
        "accuracy>0.9 or loss<0.1; none: never",
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=MAX_INT32,
        description="end the run when no model was better by --best-by than the best for this many "
        "rounds; 0: never",
    )

    @field_validator("best_by")
    @classmethod
    def _validate_goal(cls, text: str | None) -> str | None:
        return None if text is None else str(parse_goal(text))

    @field_validator("stop_when")
    @classmethod
    def _validate_bound(cls, text: str | None) -> str | None:
        return None if text is None else str(parse_bound(text))

    @property
    def goal(self) -> Goal:
        """What tells the best model of the run."""
        return LOWEST_LOSS if self.best_by is None else parse_goal(self.best_by)

    @property
    def bound(self) -> Bound | None:
        """What a model must pass for the run to stop early; None: nothing."""
        return None if self.stop_when is None else parse_bound(self.stop_when)

    def with_goal_of(self, task_goal: str) -> Self:
        """Return the settings with the task's own --best-by, if none is given."""
        if self.best_by is not None:
            return self
        settings = self.model_copy(update={"best_by": task_goal})
        # Nobody gave it: a run of earlier software goes on with what it was begun with.
        settings.model_fields_set.discard("best_by")
        return settings


class ClientEvaluationSettings(Settings):
    """How clients evaluate the global model."""

    evaluate_on_clients: bool = Field(
        default=False,
        description="clients also evaluate the global model on their own data and report the "
        "result",
    )
    holdout: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="share of its examples that a client never trains on, and evaluates the "
        "global model on; 0: it evaluates on the examples that it trains on",
    )

"""How good a global model is on the task's held-out set."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedrounds.errors import InvalidInput
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.plugins import naming_task_errors
from fedrounds.tasks.loading import batches_in_order, load_held_out
from fedrounds.tasks.task import Task, count_examples, inspect_examples
from fedrounds.tensors.codec import load_state_into
from fedrounds.training.evaluation import Batches, Evaluation, evaluate
from fedrounds.training.trial import keeping_random_streams, validate_first
from fedrounds.types import IncidentKind
from fedserver.events import event_of
from fedserver.models.checkpoints import Checkpoints
from fedserver.models.regression import detect_regression
from fedserver.models.stopping import EarlyStop, early_stop
from fedserver.phases import Phase
from fedserver.records import Attempt, ModelEvaluation
from fedserver.runtime import Threads
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore

_BATCH_SIZE = 256
_MAX_CLASSES = 100
"""Above, a confusion matrix is more than the history should hold for every round."""


class EvaluationStopped(Exception):
    """The server is stopping; the evaluation is made again at the next start."""


class Evaluator:
    """Holds the held-out set and a model to test; `evaluate` computes: call it from a thread."""

    def __init__(self, task: Task, model: nn.Module, *, data_root: Path | None) -> None:
        with naming_task_errors(f"task {task.name!r}: load_test"):
            examples = load_held_out(task, data_root)
        size = None if examples is None else count_examples(task, examples, loaded_by="load_test")
        if examples is not None and (bad := inspect_examples(task, examples)):
            raise InvalidInput(
                f"task {task.name!r}: held-out example {bad[0]} (from 0) holds a NaN or an "
                "infinity; correct the data"
            )
        if size == 0:
            raise InvalidInput(
                f"task {task.name!r}: the held-out set is empty; give it examples, or let "
                "load_test return None"
            )
        self._task = task
        self._loader = None
        if examples is not None:
            self._loader = batches_in_order(task, examples, batch_size=_BATCH_SIZE)
            self._examples = examples
            self._model = model
        self._stop = threading.Event()
        self.measured_names: Set[str] | None = None
        """The numbers that an evaluation gives, once a batch was tried; None without examples."""

    @property
    def has_data(self) -> bool:
        """Whether the task has a held-out set here."""
        return self._loader is not None

    def stop(self) -> None:
        """End an evaluation that goes on, at its next batch."""
        self._stop.set()

    def try_batch(self) -> None:
        """Measure the model that it was given on the first batch, so that errors come first.

        Raises:
            OwnCodeFailed: the task's own code raised an error, which is the cause.
            InvalidInput: an example isn't (input, target), the outputs don't fit the targets, or
                the loss or a metric is no number.
        """
        if self._loader is None:
            return
        what = f"task {self._task.name!r}: evaluating the model on the first held-out examples"
        with keeping_random_streams(torch.device("cpu")), naming_task_errors(what):
            validate_first(self._task, self._examples)
            tried = self._measure([next(iter(self._loader))])
            # Computed here, so that a metric that computes no number is refused at the start.
            _ = tried.metrics
        names = {"loss", *self._task.metrics}
        self.measured_names = names if tried.accuracy is None else {"accuracy", *names}

    def evaluate(self, path: Path) -> ModelEvaluation:
        """Measure the model in the safetensors file at `path`.

        Accuracy, mean loss, the task's metrics and, for up to 100 classes, the confusion matrix, as
        JSON can hold them: there is no NaN.

        Raises:
            EvaluationStopped: `stop` was called.
        """
        assert self._loader is not None
        load_state_into(self._model.state_dict(), path)
        measured = self._measure(self._batches())
        values, confusion = measured.metrics, measured.confusion
        return ModelEvaluation(
            accuracy=measured.accuracy,
            loss=_finite(measured.loss),
            metrics={name: _finite(values.get(name, math.nan)) for name in self._task.metrics},
            class_accuracy=None if confusion is None else class_accuracies(confusion),
            confusion=None if confusion is None else confusion.tolist(),
        )

    def _measure(self, batches: Batches) -> Evaluation:
        num_classes = self._task.num_classes
        return evaluate(
            self._model,
            batches,
            self._task.loss,
            training_step=self._task.training_step,
            metrics=self._task.metrics,
            num_classes=num_classes,
            counts_confusion=num_classes is not None and num_classes <= _MAX_CLASSES,
        )

    def _batches(self) -> Iterator[Any]:
        assert self._loader is not None
        for batch in self._loader:
            if self._stop.is_set():
                raise EvaluationStopped
            yield batch


class Evaluations:
    """Evaluates models beside the round that collects; at most one evaluation is behind."""

    def __init__(
        self,
        evaluator: Evaluator,
        settings: ServerSettings,
        *,
        detects_regressions: bool,
        store: AsyncStore,
        checkpoints: Checkpoints,
        on_news: Callable[[], None],
        threads: Threads,
    ) -> None:
        """`on_news` is called when a model may be bad, or is good enough to stop the run."""
        self._settings = settings
        self._max_rollbacks = settings.max_rollbacks
        self._detects_regressions = detects_regressions
        self._store = store
        self._checkpoints = checkpoints
        self._on_news = on_news
        self._threads = threads
        self._evaluator = evaluator
        self._evaluating: asyncio.Task[None] | None = None
        self._is_model_suspect = False
        self._may_stop = False

    @property
    def has_news(self) -> bool:
        """Whether the last model may be bad, or good enough to stop the run.

        `take_bad_round` and `take_early_stop` say whether it is.
        """
        return self._is_model_suspect or self._may_stop

    def suspect_model(self) -> None:
        """Have the last model looked at: the store may hold that it is bad."""
        self._is_model_suspect = True

    async def take_bad_round(self, run_id: str) -> Attempt | None:
        """Return the last DONE round if its model is bad and the round may be repeated.

        After this no model is suspect until something new comes up.
        """
        if not self._is_model_suspect:
            return None
        self._is_model_suspect = False
        bad = await self._store.rounds.regressed_round(run_id)
        if bad is None:
            return None
        may_repeat = await may_be_repeated(
            bad, store=self._store, max_rollbacks=self._max_rollbacks
        )
        return bad if may_repeat else None

    def suspect_end(self) -> None:
        """Have it looked at whether the run stops early: the store may hold that it does."""
        self._may_stop = self._has_end

    @property
    def _has_end(self) -> bool:
        return self._settings.bound is not None or self._settings.patience > 0

    async def take_early_stop(self, run_id: str) -> EarlyStop | None:
        """Return where the run stops early, None if it goes on or there is nothing new."""
        if not self._may_stop:
            return None
        self._may_stop = False
        return await self.early_stop(run_id)

    async def early_stop(self, run_id: str) -> EarlyStop | None:
        """Return where the run stops early by what the store holds, None if it goes on."""
        goal, bound = self._settings.goal, self._settings.bound
        if not self._has_end:
            return None
        names = {goal.name} if bound is None else {goal.name, bound.name}
        return early_stop(
            self._settings, await self._store.rounds.good_evaluations(run_id, metrics=names)
        )

    async def start(self, evaluated: Attempt, digest: str) -> None:
        """Begin to evaluate a round's model, once the evaluation before is done."""
        await self.done()
        if self._evaluator.has_data:
            self._evaluating = asyncio.create_task(self._evaluate(evaluated, digest))

    async def done(self) -> None:
        """Return when no evaluation goes on."""
        evaluating, self._evaluating = self._evaluating, None
        if evaluating is not None:
            await evaluating

    async def _evaluate(self, evaluated: Attempt, digest: str) -> None:
        try:
            evaluation = await self._threads.on_disk(
                self._evaluator.evaluate, self._checkpoints.path(digest)
            )
        except EvaluationStopped:
            return
        failpoint(FailPoint.EVALUATED)
        regression = None
        if self._detects_regressions:
            before = await self._store.rounds.good_evaluations(evaluated.run_id)
            regression = detect_regression(evaluation, list(before.values()))
        reason = None if regression is None else regression.reason
        if regression is not None and not await may_be_repeated(
            evaluated, store=self._store, max_rollbacks=self._max_rollbacks
        ):
            reason = f"{regression.reason}; it stands, --max-rollbacks allows no more repetitions"
        event = event_of(
            "evaluated" if regression is None else IncidentKind.EVALUATION_COLLAPSED,
            evaluated,
            is_incident=regression is not None,
            reason=reason,
            **dict[str, Any](evaluation.numbers),
        )
        await self._store.rounds.record_evaluation(
            evaluated,
            evaluation,
            event,
            regression=None if regression is None else regression.symptom,
        )
        if regression is not None:
            failpoint(FailPoint.ALARM_RECORDED)
            self.suspect_model()
            self._on_news()
        elif await self.early_stop(evaluated.run_id) is not None:
            self._may_stop = True
            self._on_news()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


async def may_be_repeated(bad: Attempt, *, store: AsyncStore, max_rollbacks: int) -> bool:
    """Return whether a round may be repeated once more because its model is bad.

    `max_rollbacks` is of each round by itself: how often another round was repeated doesn't matter.
    """
    phases = await store.rounds.phases_of(bad.run_id, bad.round_number)
    return phases.count(Phase.ROLLED_BACK) < max_rollbacks


def class_accuracies(confusion: torch.Tensor) -> list[float | None]:
    """Return for each class the share of its targets that were answered right; None without any.

    `confusion` is that of `fedrounds.training.evaluation.Evaluation`.
    """
    return [
        int(row[number]) / int(row.sum()) if row.any() else None
        for number, row in enumerate(confusion)
    ]

"""The training of one order: from the global model's file to an update."""

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedclient.client_algorithms import NOTHING, LocalTraining, TrainedModel, TrainingStart, begin
from fedclient.progress import ProgressReporter
from fedclient.state import ClientState, Tensors
from fedclient.update_encoding import RESIDUAL, encode_update
from fedrounds.data import AugmentedBatches, set_aside
from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis, DoctorSettings
from fedrounds.doctor import TrainingHalted
from fedrounds.doctor.batches import Batch
from fedrounds.errors import FederationError, InvalidInput, WrongSettings
from fedrounds.seeds import derive_seed
from fedrounds.tasks.loading import batches_in_order, training_batches
from fedrounds.tasks.task import (
    Examples,
    Task,
    build_model,
    count_examples,
    has_numbers,
    kinds_of,
)
from fedrounds.tensors.codec import decode_state, digest_file, load_state_into
from fedrounds.tensors.payloads import write_payload
from fedrounds.training.corrections import Correction
from fedrounds.training.effective_steps import EffectiveSteps
from fedrounds.training.evaluation import Evaluation, evaluate
from fedrounds.training.loop import (
    Callbacks,
    DoctorContext,
    EpochReport,
    StepProgress,
    TrainingReport,
    TrainingResult,
    train_model,
)
from fedrounds.training.metrics import NO_METRICS, MetricFactory, measurements_of
from fedrounds.types import (
    EVALUATION_BATCH_SIZE,
    MAX_METRIC,
    MODEL_SECTION,
    NO_COMPRESSION,
    ClientUpdate,
    Compression,
    EntryKind,
    WorkOrder,
)

logger = logging.getLogger(__name__)

LOCAL_ENTRIES = "local"
"""The name under which a client keeps its own values of entries of kind LOCAL."""


class NothingLearned(FederationError):
    """Every batch of an order was left out; the order's incidents say why."""


@dataclass(frozen=True, kw_only=True)
class OrderInputs:
    """The values that an order's update is a function of, unless the order has a deadline.

    `state` is the client's state in force from earlier rounds, `control` the file of the server's
    control variates, if there are any. The model is sent as `compression` says. `entry_kinds` are
    the server's (empty: it sent none); entries of kind LOCAL continue from the client's own values,
    which are kept and not sent.
    """

    order: WorkOrder
    task: Task
    examples: Examples
    global_model: Path
    state: ClientState
    control: Path | None = None
    compression: Compression = NO_COMPRESSION
    entry_kinds: Mapping[str, EntryKind] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """What this client decides about its training.

    A line of the log says how training goes every `log_steps` steps (0: never). Training ends after
    `max_steps` steps (0: no limit); the update is what was learned by then.
    """

    device: torch.device
    doctor: DoctorSettings
    log_steps: int = 0
    max_steps: int = 0


def train_order(
    inputs: OrderInputs,
    settings: LocalSettings,
    *,
    progress: ProgressReporter,
    payload: Path,
    on_diagnosis: Callable[[Diagnosis], None],
) -> tuple[ClientUpdate, ClientState]:
    """Train on one client's examples from the global model; write the update's payload.

    `on_diagnosis` is called with each diagnosis of the doctor.

    Trained again after a crash, an order without a deadline gives the same bytes (on one machine,
    torch build, device and number of threads).

    Returns:
        The update, and the state that comes into force if the update is counted.

    Raises:
        TrainingHalted: training went wrong, and may not or can't be cured.
        NothingLearned: there is nothing to send.
        WrongSettings: the task's model isn't the server's, a share of examples without numbers is
            to be held out, the server aggregates its entries
            otherwise than the task says, or this client doesn't know the order's client algorithm.
        OrderEnded: the server wants no update any more.
    """
    order, task, state = inputs.order, inputs.task, inputs.state
    model, kinds, global_values = _begin_model(inputs, settings.device)
    config = order.training.client_algorithm
    algorithm = begin(
        config,
        TrainingStart(
            model=model,
            parameters=config.parameters if config else {},
            kept=state.tensors,
            control=NOTHING
            if inputs.control is None
            else decode_state(inputs.control.read_bytes()),
        ),
    )
    for_training, held_out = _split_examples(order, task, inputs.examples)
    trainer = _Trainer(
        inputs, settings, model=model, algorithm=algorithm, numbers=for_training, progress=progress
    )
    evaluated = _evaluation_batches(order, task, inputs.examples, held_out)
    num_evaluations = (order.evaluate + algorithm.has_personal_model) if evaluated else 0
    progress.expect_batches(
        steps=trainer.last_step * algorithm.num_trainings,
        evaluation_batches=num_evaluations * len(evaluated or ()),
    )
    metrics: dict[str, float] = {}
    measurements: Mapping[str, Sequence[float]] = {}
    if order.evaluate and evaluated is not None:
        of_global = _evaluate(
            model, evaluated, task, settings.device, progress, metrics=task.metrics
        )
        metrics |= _numbers(of_global, prefix="global_")
        measurements = measurements_of(of_global.measured)

    effective_steps = EffectiveSteps(order.training.momentum)

    def count(step: StepProgress) -> None:
        # A batch whose examples were all left out makes no step.
        if step.batch_size:
            effective_steps.add(step.lr)

    began = time.monotonic()
    result = trainer.train(algorithm.correction, on_step=count, on_diagnosis=on_diagnosis)
    train_s = time.monotonic() - began
    report = result.report
    last_epoch = _last_epoch(report)
    was_healthy = not report.diagnoses
    output = algorithm.finish(
        TrainedModel(
            state_dict=result.state_dict,
            effective_steps=effective_steps.total,
            was_healthy=was_healthy,
            train_also=trainer.train_also,
        )
    )
    if algorithm.has_personal_model and evaluated is not None:
        of_personal = _evaluate(model, evaluated, task, settings.device, progress)
        metrics |= _numbers(of_personal, prefix="personal_")
    encoded = encode_update(
        {**output.model, **global_values},
        global_model=inputs.global_model,
        kinds=kinds,
        compression=inputs.compression,
        seed=derive_seed(order.seed, "compression"),
        residual=state.tensors.get(RESIDUAL, NOTHING),
    )
    sections = write_payload(payload, {MODEL_SECTION: encoded.tensors, **output.sections})
    digest = sections[0].digest if len(sections) == 1 else digest_file(payload)
    if report.num_steps < trainer.num_batches:
        logger.info(
            "client %d, round %d: ended after %d of %d steps; what was done is sent",
            order.client_id,
            order.round_number,
            report.num_steps,
            trainer.num_batches,
        )
    update = ClientUpdate(
        order_id=order.order_id,
        digest=digest,
        size_bytes=payload.stat().st_size,
        sections=sections,
        num_examples=report.num_examples,
        num_steps=report.num_steps,
        metrics=_admissible(
            {
                **({} if last_epoch.accuracy is None else {"accuracy": last_epoch.accuracy}),
                "loss": last_epoch.loss,
                "train_s": train_s,
                **metrics,
                **encoded.metrics,
            }
        ),
        measurements=measurements,
        encoding=inputs.compression.encoding,
    )
    remedy_decay = state.remedy_decay.after_round(
        report.treatment,
        was_healthy=was_healthy,
        has_dropped_samples=report.has_dropped_samples,
    )
    return update, ClientState(
        remedy_decay=remedy_decay,
        tensors={
            **output.kept,
            **encoded.kept,
            **_own_values(result.state_dict, names=global_values),
        },
    )


class _Trainer:
    """Trains an order's model, once or (for a personal model) twice; owns the model meanwhile."""

    def __init__(
        self,
        inputs: OrderInputs,
        settings: LocalSettings,
        *,
        model: nn.Module,
        algorithm: LocalTraining,
        numbers: list[int] | None,
        progress: ProgressReporter,
    ) -> None:
        self._inputs = inputs
        self._settings = settings
        self._model = model
        self._num_trainings = algorithm.num_trainings
        self._numbers = numbers
        self._progress = progress
        training = inputs.order.training
        self.num_batches = training.epochs * len(self._batches())
        self.last_step = min(settings.max_steps or self.num_batches, self.num_batches)
        deadline_s = training.work_deadline_s
        # The trainings of one order share its time.
        self._seconds_each = math.inf if deadline_s is None else deadline_s / self._num_trainings

    def train(
        self,
        correction: Correction,
        *,
        on_step: Callable[[StepProgress], None],
        on_diagnosis: Callable[[Diagnosis], None],
        prefix: str = "",
    ) -> TrainingResult:
        """Train the model from its present weights; each prefix has random streams of its own."""
        order, task, state = self._inputs.order, self._inputs.task, self._inputs.state
        training, log_steps = order.training, self._settings.log_steps
        began = time.monotonic()

        def is_enough(step: int) -> bool:
            return step >= self.last_step or time.monotonic() - began >= self._seconds_each

        def count_step(step: StepProgress) -> None:
            if log_steps and step.step % log_steps == 0:
                logger.info(
                    "client %d, round %d %sstep %d: loss=%.4g largest_gradient=%.4g lr=%.4g",
                    order.client_id,
                    order.round_number,
                    prefix,
                    step.step,
                    step.loss,
                    step.largest_gradient,
                    step.lr,
                )
            on_step(step)
            self._progress.add(steps=1, loss=step.loss)
            self._progress.raise_if_over()

        return train_model(
            self._model,
            self._batches(prefix),
            epochs=training.epochs,
            lr=training.lr,
            device=self._settings.device,
            loss=task.loss,
            training_step=task.training_step,
            optimizer=training.optimizer,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            schedule=training.schedule,
            correction=correction,
            callbacks=Callbacks(
                on_step=count_step,
                gradient_every=log_steps,
                is_enough=is_enough,
                on_replay=self._count_replay,
                on_diagnosis=on_diagnosis,
            ),
            doctor=self._settings.doctor,
            doctor_context=DoctorContext(
                num_classes=task.num_classes,
                is_initial=order.round_number == 1,
                fresh_state=functools.partial(_fresh_state, order, task),
                treatment=state.remedy_decay.treatment,
            ),
            keeps_model=self._num_trainings > 1,
        )

    def train_also(self, weights: Tensors, correction: Correction) -> Tensors:
        """Train a personal model's weights as the order says; the model holds them afterwards.

        If the doctor can't cure a failure, the weights stay as they are. The update doesn't depend
        on them, so it is still sent; the client's log shows the failure, the server doesn't get it.
        """
        order = self._inputs.order
        _put(weights, self._model)
        _seed(derive_seed(order.seed, "personal"), self._settings.device)
        try:
            return self.train(
                correction,
                on_step=lambda _: None,
                on_diagnosis=functools.partial(_log_personal, order),
                prefix="personal ",
            ).state_dict
        except TrainingHalted as error:
            _log_personal(order, error)
            _put(weights, self._model)
            return weights

    def _count_replay(self) -> None:
        self._progress.add(replays=1)
        self._progress.raise_if_over()

    def _batches(self, prefix: str = "") -> DataLoader[Any] | AugmentedBatches:
        """Return the batches of a training; each prefix orders the same examples differently."""
        training, seed = self._inputs.order.training, self._inputs.order.seed
        loader = training_batches(
            self._inputs.task,
            self._inputs.examples,
            batch_size=training.batch_size,
            seed=derive_seed(seed, f"{prefix}batches"),
            numbers=self._numbers,
        )
        if training.augmentation == "none":
            return loader
        return AugmentedBatches(
            loader, name=training.augmentation, seed=derive_seed(seed, f"{prefix}augmentation")
        )


def _own_values(trained: Tensors, *, names: Collection[str]) -> Mapping[str, Tensors]:
    """Return the client's own values of its LOCAL entries, which have these names."""
    return {LOCAL_ENTRIES: {name: trained[name] for name in names}} if names else {}


def _admissible(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that the server admits: without NaN and values beyond MAX_METRIC."""
    return {name: value for name, value in metrics.items() if abs(value) <= MAX_METRIC}


def _last_epoch(report: TrainingReport) -> EpochReport:
    """Return the report of the last epoch in which at least one batch was learned from.

    Raises:
        NothingLearned: there is none.
    """
    for epoch in reversed(report.epochs):
        if not math.isnan(epoch.loss):
            return epoch
    raise NothingLearned("every batch was left out, so there is nothing to send")


def _split_examples(
    order: WorkOrder, task: Task, examples: Examples
) -> tuple[list[int] | None, list[int] | None]:
    """Return the numbers of the examples to train on and of those to evaluate on; None: all.

    They are the same in every round, attempt and run, so no held-out example is ever trained on.
    """
    if order.holdout == 0:
        return None, None
    if not has_numbers(examples):
        raise WrongSettings(
            f"the server holds out {order.holdout:g} of each client's examples, but load_train of "
            f"task {task.name!r} returned a {type(examples).__name__}, whose examples have no "
            "numbers; return a map-style data set, or ask for a run without --holdout"
        )
    return set_aside(
        count_examples(task, examples, loaded_by="load_train"),
        share=order.holdout,
        seed=derive_seed(0, "holdout", client_id=order.client_id),
    )


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a training on this device draws from."""
    if device.type == "cpu":
        # torch.manual_seed records a stack for each kind of device that isn't here: 2 ms.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _log_personal(order: WorkOrder, failure: Diagnosis | TrainingHalted) -> None:
    logger.warning(
        "client %d, round %d, its personal model: %s",
        order.client_id,
        order.round_number,
        verdict(failure) if isinstance(failure, Diagnosis) else f"{failure}; it stays as it was",
    )


def _put(weights: Tensors, model: nn.Module) -> None:
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            entry.copy_(weights[name])


def _fresh_state(order: WorkOrder, task: Task) -> dict[str, Tensor]:
    """Return newly drawn initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(order.seed, "model"))
        return build_model(task).state_dict()


def _begin_model(
    inputs: OrderInputs, device: torch.device
) -> tuple[nn.Module, Mapping[str, EntryKind], Tensors]:
    """Return the task's model with the global model's weights and the client's own LOCAL entries.

    Returns:
        The model, the kind of each entry, and the global values of the LOCAL entries.

    Raises:
        WrongSettings: the model isn't the server's, or the server aggregates its entries otherwise.
            An entry that is LOCAL on one side must not be sent: that would disclose it.
    """
    order, task = inputs.order, inputs.task
    _seed(derive_seed(order.seed, "model"), device)
    model = build_model(task)
    try:
        load_state_into(model.state_dict(), inputs.global_model)
    except InvalidInput as error:
        raise WrongSettings(
            f"the server's model isn't that of task {task.name!r} here ({error}); "
            "both sides need the same version of the task"
        ) from error
    kinds = kinds_of(task, model)
    server_kinds = inputs.entry_kinds
    if server_kinds and (
        differing := sorted(n for n in kinds if server_kinds.get(n) is not kinds[n])
    ):
        name = differing[0]
        raise WrongSettings(
            f"the server aggregates entry {name!r} as {server_kinds.get(name, 'nothing')}, but "
            f"task {task.name!r} here says {kinds[name]}; both sides need the same version of "
            "the task"
        )
    entries = model.state_dict()
    global_values = {
        name: entries[name].detach().cpu().clone()
        for name, kind in kinds.items()
        if kind is EntryKind.LOCAL
    }
    own = inputs.state.tensors.get(LOCAL_ENTRIES, NOTHING)
    with torch.no_grad():
        for name in global_values.keys() & own.keys():
            entries[name].copy_(own[name])
    return model, kinds, global_values


def _evaluation_batches(
    order: WorkOrder, task: Task, examples: Examples, held_out: list[int] | None
) -> DataLoader[Any] | None:
    """Return the batches to evaluate models on, None if too few examples are held out."""
    if order.holdout and not held_out:
        return None
    return batches_in_order(task, examples, batch_size=EVALUATION_BATCH_SIZE, numbers=held_out)


def _evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    task: Task,
    device: torch.device,
    progress: ProgressReporter,
    *,
    metrics: Mapping[str, MetricFactory] = NO_METRICS,
) -> Evaluation:

    def batches() -> Iterator[Batch]:
        for batch in loader:
            yield batch
            # Report each batch: the server would take a client with much data for stalled.
            progress.add(evaluation_batches=1)
            progress.raise_if_over()

    return evaluate(
        model,
        batches(),
        task.loss,
        device,
        training_step=task.training_step,
        metrics=metrics,
        num_classes=task.num_classes,
    )


def _numbers(evaluation: Evaluation, *, prefix: str) -> dict[str, float]:
    """Return loss, number of examples and, for classes, accuracy, each name with the prefix."""
    measured = {
        f"{prefix}examples": float(evaluation.num_examples),
        f"{prefix}loss": evaluation.loss,
    }
    if evaluation.accuracy is None:
        return measured
    return {f"{prefix}accuracy": evaluation.accuracy, **measured}

"""One order's training: from the global model's file to an update."""

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedclient.client_algorithms import NOTHING, Start, Trained, begin_rule
from fedclient.progress import ProgressReporter
from fedclient.state import ClientState, Tensors
from fedclient.update_encoding import RESIDUAL, encode_update
from fedrounds.data import AugmentedBatches, make_loader, set_aside
from fedrounds.data.loaders import NumberedLoader
from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis, DoctorSettings
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import FederationError, InvalidInput, WrongSettings
from fedrounds.seeds import derive_seed
from fedrounds.tasks.task import Examples, Task, build_model, kinds_of
from fedrounds.tensors.codec import decode_state, digest_file, load_state_into
from fedrounds.tensors.payloads import write_payload
from fedrounds.training.corrections import Correction
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import (
    EpochReport,
    StepProgress,
    TrainingReport,
    TrainingResult,
    train_model,
)
from fedrounds.types import (
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

_EVALUATION_BATCH_SIZE = 256
_NOT_TOLD: Mapping[str, EntryKind] = {}


class NothingLearned(FederationError):
    """No batch of an order was left to learn from; what was wrong with them is on record."""


def train_order(
    order: WorkOrder,
    *,
    task: Task,
    examples: Examples,
    global_model: Path,
    device: torch.device,
    progress: ProgressReporter,
    payload: Path,
    doctor: DoctorSettings,
    state: ClientState,
    on_diagnosis: Callable[[Diagnosis], None],
    log_steps: int = 0,
    max_steps: int = 0,
    control: Path | None = None,
    compression: Compression = NO_COMPRESSION,
    entry_kinds: Mapping[str, EntryKind] = _NOT_TOLD,
) -> tuple[ClientUpdate, ClientState]:
    """Train on one client's examples from the global model; writes the update's payload.

    Every `log_steps` steps (0: never) one log line says how training goes. After `max_steps` steps
    (0: no limit), or at the order's deadline, training ends and what was done is the update.
    `state` is what is in force from earlier rounds, `control` holds the server's control variates,
    if there are any, and `on_diagnosis` hears of what goes wrong. The model is sent as
    `compression` says. `entry_kinds` are the server's; entries of kind LOCAL go on from the
    client's own values, which are kept and not sent.

    A function of the order, the examples, the global model and the state alone, unless the order
    has a deadline: trained again after a crash, it gives the same bytes (on one machine, build,
    device and number of threads).

    Returns:
        The update, and the state that comes into force if it is counted.

    Raises:
        TrainingHalted: training went wrong, and may not or can't be cured.
        NothingLearned: there is nothing to send.
        WrongSettings: the task's model isn't the one the server holds, its entries are aggregated
            otherwise than the task here says, or the order's client algorithm isn't known here.
        OrderAbandoned: the server wants no update any more.
    """
    model, kinds, global_values = _begin_model(
        *(order, task, global_model, device), told=entry_kinds, state=state
    )

    training = order.training
    rule = begin_rule(
        training.client_algorithm,
        Start(
            model=model,
            parameters=training.client_algorithm.parameters if training.client_algorithm else {},
            kept=state.tensors,
            control=NOTHING if control is None else decode_state(control.read_bytes()),
        ),
    )
    for_training, held_out = _examples_of(order, examples)
    num_batches = training.epochs * len(_batches(order, examples, for_training))
    last_step = min(max_steps or num_batches, num_batches)
    evaluated = _evaluation_batches(order, examples, held_out)
    num_evaluations = (order.evaluate + rule.is_personal) if evaluated else 0
    progress.expect_batches(
        steps=last_step * rule.num_trainings,
        evaluation_batches=num_evaluations * len(evaluated or ()),
    )
    metrics: dict[str, float] = (
        _metrics_of(model, evaluated, task, device, progress, prefix="global_")
        if order.evaluate and evaluated is not None
        else {}
    )

    travel = _Travel(training.momentum)

    def count_replay() -> None:
        progress.add(replays=1)
        progress.raise_if_over()

    def train(
        correction: Correction,
        on_step: Callable[[StepProgress], None],
        tell: Callable[[Diagnosis], None],
        *,
        prefix: str = "",
    ) -> TrainingResult:
        """Train the model from where it is; the prefix gives random streams of their own."""
        began = time.monotonic()
        enough_s = _seconds_each(training.work_deadline_s, rule.num_trainings)

        def is_enough(step: int) -> bool:
            return step >= last_step or time.monotonic() - began >= enough_s

        def count_step(taken: StepProgress) -> None:
            if log_steps and taken.step % log_steps == 0:
                logger.info(
                    "client %d, round %d %sstep %d: loss=%.4g largest_gradient=%.4g lr=%.4g",
                    *(order.client_id, order.round_number, prefix, taken.step),
                    *(taken.loss, taken.largest_gradient, taken.lr),
                )
            on_step(taken)
            progress.add(steps=1, loss=taken.loss)
            progress.raise_if_over()

        return train_model(
            model,
            _batches(order, examples, for_training, prefix=prefix),
            epochs=training.epochs,
            lr=training.lr,
            device=device,
            loss=task.loss,
            optimizer=training.optimizer,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            schedule=training.schedule,
            correction=correction,
            is_enough=is_enough,
            on_step=count_step,
            gradient_every=log_steps,
            doctor=doctor,
            num_classes=task.num_classes,
            is_initial=order.round_number == 1,
            fresh_state=functools.partial(_fresh_state, order, task),
            treatment=state.convalescence.treatment,
            on_replay=count_replay,
            on_diagnosis=tell,
            keeps_model=rule.num_trainings > 1,
        )

    def train_also(weights: Tensors, correction: Correction) -> Tensors:
        """Train other weights as the order says; the model holds them then.

        Where that can't be cured they stay as they are. The update doesn't depend on them, so it's
        sent, and what went wrong is told here and not to the server.
        """
        _put(weights, model)
        _seed(derive_seed(order.seed, "personal"), device)
        try:
            return train(
                *(correction, lambda _: None, functools.partial(_log_personal, order)),
                prefix="personal ",
            ).state_dict
        except TrainingHalted as error:
            _log_personal(order, error)
            _put(weights, model)
            return weights

    began = time.monotonic()
    result = train(rule.correction, travel.count, on_diagnosis)
    train_s = time.monotonic() - began
    report = result.report
    learned = _last_epoch(report)
    was_healthy = not report.diagnoses
    outcome = rule.end(
        Trained(
            state_dict=result.state_dict,
            travel=travel.so_far,
            was_healthy=was_healthy,
            train_also=train_also,
        )
    )
    if rule.is_personal and evaluated is not None:
        metrics |= _metrics_of(model, evaluated, task, device, progress, prefix="personal_")
    encoded = encode_update(
        {**outcome.model, **global_values},
        global_model=global_model,
        kinds=kinds,
        compression=compression,
        seed=derive_seed(order.seed, "compression"),
        residual=state.tensors.get(RESIDUAL, NOTHING),
    )
    sections = write_payload(payload, {MODEL_SECTION: encoded.tensors, **outcome.sections})
    digest = sections[0].digest if len(sections) == 1 else digest_file(payload)
    if report.num_steps < num_batches:
        logger.info(
            "client %d, round %d: ended after %d of %d steps; what was done is sent",
            *(order.client_id, order.round_number, report.num_steps, num_batches),
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
                "accuracy": learned.accuracy,
                "loss": learned.loss,
                "train_s": train_s,
                **metrics,
                **encoded.metrics,
            }
        ),
        encoding=compression.encoding,
    )
    convalescence = state.convalescence.after_round(
        report.treatment,
        was_healthy=was_healthy,
        has_dropped_samples=report.has_dropped_samples,
    )
    return update, ClientState(
        convalescence=convalescence,
        tensors={
            **outcome.kept,
            **encoded.kept,
            **_own_values(result.state_dict, names=global_values),
        },
    )


def _own_values(trained: Tensors, *, names: Collection[str]) -> Mapping[str, Tensors]:
    """Return what a client keeps of its LOCAL entries, which have these names."""
    return {LOCAL_ENTRIES: {name: trained[name] for name in names}} if names else {}


def _admissible(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that the server takes: without a loss that is NaN or beyond MAX_METRIC."""
    return {name: value for name, value in metrics.items() if abs(value) <= MAX_METRIC}


def _last_epoch(report: TrainingReport) -> EpochReport:
    """Return how the last epoch went of which not every batch was left out.

    Raises:
        NothingLearned: there is none.
    """
    for one in reversed(report.epochs):
        if not math.isnan(one.loss):
            return one
    raise NothingLearned("every batch was left out, so there is nothing to send")


def _examples_of(order: WorkOrder, examples: Examples) -> tuple[list[int] | None, list[int] | None]:
    """Return the numbers of the examples to train on and of those to evaluate on; None: all.

    They are the same in every round, attempt and run: nothing held out is ever trained on.
    """
    if order.holdout == 0:
        return None, None
    return set_aside(
        len(examples),  # type: ignore[arg-type]  # Dataset doesn't declare __len__
        share=order.holdout,
        seed=derive_seed(0, "holdout", client_id=order.client_id),
    )


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a training on this device draws from."""
    if device.type == "cpu":
        # For each kind of device that isn't here torch.manual_seed writes a whole stack down, 2 ms.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class _Travel:
    """By how much a gradient of 1 in every step would have moved a parameter (see Trained)."""

    def __init__(self, momentum: float) -> None:
        self.so_far = 0.0
        self._momentum = momentum
        self._reach = 0.0

    def count(self, taken: StepProgress) -> None:
        """Count a step; of a batch of which nothing was left there was none."""
        if taken.batch_size:
            # What momentum makes of equal gradients: 1, 1 + m, 1 + m + m^2, ...
            self._reach = self._momentum * self._reach + 1
            self.so_far += taken.lr * self._reach


def _seconds_each(deadline_s: float | None, num_trainings: int) -> float:
    """Return how long one of an order's trainings may take: they share its time."""
    return math.inf if deadline_s is None else deadline_s / num_trainings


def _log_personal(order: WorkOrder, wrong: Diagnosis | TrainingHalted) -> None:
    what = verdict(wrong) if isinstance(wrong, Diagnosis) else f"{wrong}; it stays as it was"
    logger.warning(
        "client %d, round %d, its personal model: %s", order.client_id, order.round_number, what
    )


def _put(weights: Tensors, model: nn.Module) -> None:
    with torch.no_grad():
        for name, one in model.state_dict().items():
            one.copy_(weights[name])


def _fresh_state(order: WorkOrder, task: Task) -> dict[str, Tensor]:
    """Return usual initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(order.seed, "model"))
        return build_model(task).state_dict()


def _model_of(order: WorkOrder, task: Task, global_model: Path, device: torch.device) -> nn.Module:
    """Return the task's model with the global model's weights."""
    _seed(derive_seed(order.seed, "model"), device)
    model = build_model(task)
    try:
        load_state_into(model.state_dict(), global_model)
    except InvalidInput as error:
        raise WrongSettings(
            f"the server's model isn't that of task {task.name!r} here ({error}); "
            "both sides need the same version of the task"
        ) from error
    return model


def _begin_model(
    order: WorkOrder,
    task: Task,
    global_model: Path,
    device: torch.device,
    *,
    told: Mapping[str, EntryKind],
    state: ClientState,
) -> tuple[nn.Module, Mapping[str, EntryKind], Tensors]:
    """Return the task's model with the global model's weights and the client's own LOCAL entries.

    Returns:
        The model, the kind of each entry, and the global values of those that are LOCAL.

    Raises:
        WrongSettings: the model isn't the server's, or the server aggregates its entries otherwise;
            sending an entry that one side calls local would give it away.
    """
    model = _model_of(order, task, global_model, device)
    kinds = kinds_of(task, model)
    if told and (differing := sorted(n for n in kinds if told.get(n) is not kinds[n])):
        name = differing[0]
        raise WrongSettings(
            f"the server aggregates entry {name!r} as {told.get(name, 'nothing')}, but task "
            f"{task.name!r} here says {kinds[name]}; both sides need the same version of the task"
        )
    entries = model.state_dict()
    global_values = {
        name: entries[name].detach().cpu().clone()
        for name, kind in kinds.items()
        if kind is EntryKind.LOCAL
    }
    own = state.tensors.get(LOCAL_ENTRIES, NOTHING)
    with torch.no_grad():
        for name in global_values.keys() & own.keys():
            entries[name].copy_(own[name])
    return model, kinds, global_values


def _evaluation_batches(
    order: WorkOrder, examples: Examples, held_out: list[int] | None
) -> NumberedLoader | None:
    """Return what models are measured on, None if too few are held out."""
    if order.holdout and not held_out:
        return None
    return make_loader(examples, batch_size=_EVALUATION_BATCH_SIZE, shuffle=False, numbers=held_out)


def _batches(
    order: WorkOrder, examples: Examples, numbers: list[int] | None, *, prefix: str = ""
) -> NumberedLoader | AugmentedBatches:
    """Return the batches of an order's training; the prefix gives others of the same examples."""
    training = order.training
    loader = make_loader(
        examples,
        batch_size=training.batch_size,
        seed=derive_seed(order.seed, f"{prefix}batches"),
        numbers=numbers,
    )
    if training.augmentation == "none":
        return loader
    seed = derive_seed(order.seed, f"{prefix}augmentation")
    return AugmentedBatches(loader, name=training.augmentation, seed=seed)


def _metrics_of(
    model: nn.Module,
    loader: NumberedLoader,
    task: Task,
    device: torch.device,
    progress: ProgressReporter,
    *,
    prefix: str,
) -> dict[str, float]:
    def batches() -> Iterator[tuple[Tensor, ...]]:
        for batch in loader:
            yield batch
            # Counted, or a client with much data would seem to be stalled.
            progress.add(evaluation_batches=1)
            progress.raise_if_over()

    found = evaluate(model, batches(), task.loss, device)
    return {
        f"{prefix}accuracy": found.accuracy,
        f"{prefix}examples": float(found.num_examples),
        f"{prefix}loss": found.loss,
    }

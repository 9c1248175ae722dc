"""One order's training: from the global model's file to an update."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fedclient.local_rules import correction_of
from fedclient.progress import ProgressReporter
from shared.codec import digest_file, load_state_into, write_state
from shared.data import AugmentedBatches, make_loader, set_aside
from shared.data.loaders import NumberedLoader
from shared.diagnosis import Diagnosis, DoctorSettings
from shared.doctor.easing import Convalescence
from shared.errors import InvalidInput, WrongSettings
from shared.evaluation import evaluate
from shared.seeds import derive_seed
from shared.tasks import Examples, Task
from shared.training import StepProgress, train_model
from shared.types import MODEL_SECTION, ClientUpdate, Section, WorkOrder

logger = logging.getLogger(__name__)

_EVALUATION_BATCH_SIZE = 256


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
    state: Convalescence,
    on_diagnosis: Callable[[Diagnosis], None],
    log_steps: int = 0,
    max_steps: int = 0,
) -> tuple[ClientUpdate, Convalescence]:
    """Train on one client's examples from the global model; writes the update's payload.

    Every `log_steps` steps (0: never) one log line says how training goes. After `max_steps` steps
    (0: no limit), or at the order's deadline, training ends and what was done is the update.
    `state` is what is in force from earlier rounds, `on_diagnosis` hears of what goes wrong.

    A function of the order, the examples, the global model and the state alone, unless the order
    has a deadline: trained again after a crash, it gives the same bytes (on one machine, build,
    device and number of threads).

    Returns:
        The update, and the state that comes into force if it is counted.

    Raises:
        TrainingHalted: training went wrong, and may not or can't be cured.
        WrongSettings: the task's model isn't the one the server holds, or the order's local rule
            isn't known here.
        OrderAbandoned: the server wants no update any more.
    """
    _seed(derive_seed(order.seed, "model"), device)
    model = task.build_model()

    def fresh_state() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(order.seed, "model"))
            return task.build_model().state_dict()

    try:
        load_state_into(model.state_dict(), global_model)
    except InvalidInput as error:
        raise WrongSettings(
            f"the server's model isn't that of task {task.name!r} here ({error}); "
            "both sides need the same version of the task"
        ) from error
    training = order.training
    for_training, held_out = _examples_of(order, examples)
    loader = make_loader(
        examples,
        batch_size=training.batch_size,
        seed=derive_seed(order.seed, "batches"),
        numbers=for_training,
    )
    batches = (
        loader
        if training.augmentation == "none"
        else AugmentedBatches(
            loader, name=training.augmentation, seed=derive_seed(order.seed, "augmentation")
        )
    )
    num_batches = training.epochs * len(loader)
    last_step = min(max_steps or num_batches, num_batches)
    metrics: dict[str, float] = {}
    if order.evaluate and (order.holdout == 0 or held_out):
        evaluated = make_loader(
            examples, batch_size=_EVALUATION_BATCH_SIZE, shuffle=False, numbers=held_out
        )
        progress.expect_batches(len(evaluated) + last_step)
        metrics = _metrics_of_global_model(model, evaluated, task, device, progress)
    else:
        progress.expect_batches(last_step)

    def count_step(taken: StepProgress) -> None:
        if log_steps and taken.step % log_steps == 0:
            logger.info(
                "client %d, round %d step %d: loss=%.4g largest_gradient=%.4g lr=%.4g",
                *(order.client_id, order.round_number, taken.step),
                *(taken.loss, taken.largest_gradient, taken.lr),
            )
        progress.add(batches=1)
        progress.examine()

    def count_replay() -> None:
        progress.add(replays=1)
        progress.examine()

    began = time.monotonic()

    def is_enough(step: int) -> bool:
        deadline_s = training.work_deadline_s
        return step >= last_step or (
            deadline_s is not None and time.monotonic() - began >= deadline_s
        )

    result = train_model(
        model,
        batches,
        epochs=training.epochs,
        lr=training.lr,
        device=device,
        loss=task.loss,
        optimizer=training.optimizer,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        schedule=training.schedule,
        correction=correction_of(training.local_rule),
        is_enough=is_enough,
        on_step=count_step,
        gradient_every=log_steps,
        doctor=doctor,
        num_classes=task.num_classes,
        is_initial=order.round_number == 1,
        fresh_state=fresh_state,
        treatment=state.treatment,
        on_replay=count_replay,
        on_diagnosis=on_diagnosis,
        keeps_model=False,
    )
    train_s = time.monotonic() - began
    write_state(payload, result.state_dict)
    digest = digest_file(payload)
    size_bytes = payload.stat().st_size
    report = result.report
    if report.num_steps < num_batches:
        logger.info(
            "round %d: ended after %d of %d steps; what was done is sent",
            *(order.round_number, report.num_steps, num_batches),
        )
    update = ClientUpdate(
        order_id=order.order_id,
        digest=digest,
        size_bytes=size_bytes,
        sections=(Section(name=MODEL_SECTION, digest=digest, size_bytes=size_bytes),),
        num_examples=report.num_examples,
        num_steps=report.num_steps,
        metrics={
            "accuracy": result.accuracy,
            "loss": report.epochs[-1].loss,
            "train_s": train_s,
            **metrics,
        },
    )
    return update, state.after_round(
        report.treatment,
        was_healthy=not report.diagnoses,
        has_dropped_samples=report.has_dropped_samples,
    )


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


def _metrics_of_global_model(
    model: nn.Module,
    loader: NumberedLoader,
    task: Task,
    device: torch.device,
    progress: ProgressReporter,
) -> dict[str, float]:
    def batches() -> Iterator[tuple[Tensor, ...]]:
        for batch in loader:
            yield batch
            # Counted, or a client with much data would seem to be stalled.
            progress.add(batches=1)
            progress.examine()

    found = evaluate(model, batches(), task.loss, device)
    # A loss beyond all numbers isn't a metric; the accuracy says enough.
    loss = {"global_loss": found.loss} if math.isfinite(found.loss) else {}
    return {
        "global_accuracy": found.accuracy,
        "global_examples": float(found.num_examples),
        **loss,
    }

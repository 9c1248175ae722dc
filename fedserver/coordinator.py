"""The round loop: safe to kill at any line and to start again.

    choose a cohort -> collect -> close -> aggregate -> DONE and the next round, one transaction

Each step rests on the phase that the store holds and can be repeated with the same result.
Evaluation goes on beside the next round.
"""

import asyncio
import logging
import math
import time
from typing import Any

from fedserver.admission import AdmissionLimits
from fedserver.checkpoints import GlobalModel, NonFiniteAggregate
from fedserver.evaluation import (
    EvaluationStopped,
    Evaluator,
    class_accuracies,
    initial_state,
    summarise_clients,
)
from fedserver.events import event_of
from fedserver.orderbook import OpenOrder
from fedserver.parts import Parts
from fedserver.records import Event, Order, Round, RunState, StoredUpdate
from fedserver.rounds import OrderState, Phase, RoundEvent, due_event
from fedserver.sampling import choose_cohort
from fedserver.strategies import find_strategy
from fedserver.strategies.blocks import StateFile
from shared.codec import read_layout
from shared.errors import RunFailed
from shared.failpoints import FailPoint, pass_by
from shared.seeds import derive_seed
from shared.tasks import Task
from shared.types import MODEL_SECTION, IncidentKind, Section, WorkOrder

logger = logging.getLogger(__name__)

_MAX_TICK_S = 1.0


class Coordinator:
    """Drives one run from its first round, or from where it was, to its end."""

    def __init__(self, parts: Parts, *, task: Task, evaluator: Evaluator) -> None:
        settings = parts.settings
        self._parts = parts
        self._task = task
        self._evaluator = evaluator
        self._strategy = find_strategy(settings.strategy)
        self._last_counted: dict[int, str] = {}
        self._evaluating: asyncio.Task[None] | None = None
        self._tick_s = min(_MAX_TICK_S, settings.stall_after / 4, settings.lease / 4)

    async def complete(self) -> str:
        """Run every round that is left; returns the final model's digest.

        Raises:
            RunFailed: a round failed as often as it may be tried.
        """
        current, base = await self._resume()
        while not (
            current.phase is Phase.DONE and current.round_number == self._parts.settings.rounds
        ):
            if current.phase is Phase.COLLECTING:
                current = await self._collect(current)
            elif current.phase is Phase.AGGREGATING:
                current, base = await self._aggregate(current, base)
            elif (
                current.phase is Phase.FAILED
                and current.attempt >= self._parts.settings.max_attempts
            ):
                await self._fail_run(current)
            else:
                current = await self._open_next(current, base)
        await self._evaluation_done()
        return base.digest

    async def end(self) -> None:
        """Record that the run is over."""
        await self._parts.workers.in_store(
            self._parts.store.end_run,
            self._parts.run.run_id,
            RunState.FINISHED,
            event_of("run-finished"),
        )

    # ---- steps

    async def _resume(self) -> tuple[Round, GlobalModel]:
        in_store, on_disk = self._parts.workers.in_store, self._parts.workers.on_disk
        run_id = self._parts.run.run_id
        latest = await in_store(self._parts.store.latest_round, run_id)
        self._last_counted = await in_store(self._parts.store.last_counted_orders, run_id)
        if latest is None:
            await on_disk(self._parts.spool.drop_all_but, set())
            seed = derive_seed(self._parts.settings.seed, "init")
            state_dict = await on_disk(
                initial_state, self._task, seed=seed, init=self._parts.settings.init
            )
            base = await on_disk(self._parts.checkpoints.save_initial, state_dict)
            return await self._open(1, attempt=1, base=base), base
        happened = event_of(IncidentKind.SERVER_RESTARTED, latest, is_incident=True)
        await in_store(self._parts.store.add_events, run_id, [happened])
        self._parts.bus.publish(happened)
        digest = latest.model_digest if latest.phase is Phase.DONE else latest.base_digest
        assert digest is not None
        base = await on_disk(self._parts.checkpoints.load, digest)
        is_unfinished = latest.phase in (Phase.COLLECTING, Phase.AGGREGATING)
        kept = {order.order_id for order in latest.orders} if is_unfinished else set()
        if not self._parts.settings.keep_updates:
            await on_disk(self._parts.spool.drop_all_but, kept)
        for done in await in_store(self._parts.store.unevaluated_rounds, run_id):
            assert done.model_digest is not None
            await self._start_evaluation(done, done.model_digest)
        if latest.phase is Phase.COLLECTING:
            self._hand_out(latest, base)
        return latest, base

    async def _open_next(self, ended: Round, base: GlobalModel) -> Round:
        if ended.phase is Phase.FAILED:
            return await self._open(ended.round_number, attempt=ended.attempt + 1, base=base)
        return await self._open(ended.round_number + 1, attempt=1, base=base)

    async def _open(self, round_number: int, *, attempt: int, base: GlobalModel) -> Round:
        """Wait until there are clients enough, then open the round."""
        has_said_so = False
        while (planned := self._plan(round_number, attempt=attempt, base=base)) is None:
            if not has_said_so:
                logger.info("waiting for clients: %d are needed", self._parts.settings.min_clients)
                has_said_so = True
            await self._parts.sessions.changed.wait(self._tick_s)
        happened = _opened(planned)
        await self._parts.workers.in_store(self._parts.store.open_round, planned, happened)
        pass_by(FailPoint.ROUND_OPENED)
        self._hand_out(planned, base)
        self._parts.bus.publish(happened)
        return planned

    def _plan(self, round_number: int, *, attempt: int, base: GlobalModel) -> Round | None:
        """Return the round to open, or None while there are too few clients."""
        settings = self._parts.settings
        candidates = self._parts.sessions.ready_clients(only_live=not settings.require_all)
        if len(candidates) < settings.min_clients:
            return None
        place = {"round_number": round_number, "attempt": attempt}
        cohort = choose_cohort(
            candidates,
            size=settings.clients_per_round,
            seed=derive_seed(settings.seed, "cohort", **place),
        )
        run_id = self._parts.run.run_id
        return Round(
            run_id=run_id,
            round_number=round_number,
            attempt=attempt,
            phase=Phase.COLLECTING,
            base_digest=base.digest,
            max_delta_norm=settings.max_delta_norm or 100 * (1 + base.parameter_norm),
            orders=tuple(
                Order(
                    order_id=f"{run_id}-r{round_number}-a{attempt}-c{client_id}-s1",
                    client_id=client_id,
                )
                for client_id in cohort
            ),
        )

    def _hand_out(self, opened: Round, base: GlobalModel) -> None:
        settings = self._parts.settings
        section = Section(
            name=MODEL_SECTION, digest=base.digest, size_bytes=base.file.layout.size_bytes
        )
        self._parts.downloads.publish(base.digest)
        self._parts.book.open_round(
            opened,
            base=base,
            limits=AdmissionLimits(
                max_num_examples=settings.max_num_examples,
                max_delta_norm=opened.max_delta_norm,
                max_steps_per_example=settings.epochs,
            ),
            orders=[
                WorkOrder(
                    order_id=order.order_id,
                    client_id=order.client_id,
                    round_number=opened.round_number,
                    attempt=opened.attempt,
                    sections=(section,),
                    training=settings.training_in(opened.round_number),
                    seed=derive_seed(
                        settings.seed,
                        "train",
                        round_number=opened.round_number,
                        attempt=opened.attempt,
                        client_id=order.client_id,
                    ),
                    last_counted_order_id=self._last_counted.get(order.client_id, ""),
                    evaluate=settings.evaluate_on_clients,
                )
                for order in opened.orders
            ],
        )

    async def _collect(self, current: Round) -> Round:
        """Wait for updates until the round closes or fails."""
        assert self._parts.book.current is not None
        opened_at = self._parts.book.current.opened_at
        while True:
            await self._give_up_orders()
            deadline_s = self._parts.settings.round_deadline
            due = due_event(
                self._parts.book.states(),
                min_updates=self._updates_needed(current),
                is_overdue=deadline_s is not None and time.monotonic() - opened_at > deadline_s,
            )
            if due is RoundEvent.CLOSE:
                happened = event_of("round-closed", current)
                pass_by(FailPoint.ROUND_CLOSING)
                await self._parts.workers.in_store(self._parts.store.close_round, current, happened)
                pass_by(FailPoint.ROUND_CLOSED)
                break
            if due is RoundEvent.FAIL:
                return await self._fail_round(current, "too few updates can still come")
            await self._parts.book.round_changed.wait(self._tick_s)
        self._parts.book.close_round()
        self._parts.bus.publish(happened)
        return await self._latest()

    def _updates_needed(self, current: Round) -> int:
        if self._parts.settings.require_all:
            return len(current.orders)
        return min(self._parts.settings.updates_needed, len(current.orders))

    async def _give_up_orders(self) -> None:
        """Abandon the orders whose clients don't get further, or are gone."""
        if self._parts.settings.require_all:
            return
        for order in self._parts.book.open_orders():
            stalled = order.handed_out_at is not None and (
                self._parts.book.idle_s(order) > self._parts.settings.stall_after
            )
            lost = order.handed_out_at is None and not self._parts.sessions.has_live_holder(
                order.order.client_id
            )
            if stalled or lost:
                kind = IncidentKind.CLIENT_STALLED if stalled else IncidentKind.CLIENT_LOST
                await self._abandon(order, kind)

    async def _abandon(self, order: OpenOrder, kind: IncidentKind) -> None:
        """End an order without an update, and say why."""
        current = self._parts.book.current
        assert current is not None
        happened = event_of(
            kind,
            current.record,
            client_id=order.order.client_id,
            is_incident=True,
            idle_s=self._parts.book.idle_s(order),
        )
        order_id = order.order.order_id
        if await self._parts.workers.in_store(
            self._parts.store.abandon_order, self._parts.run.run_id, order_id, happened
        ):
            self._parts.book.settle(order_id, OrderState.ABANDONED)
            self._parts.bus.publish(happened)

    async def _aggregate(self, current: Round, base: GlobalModel) -> tuple[Round, GlobalModel]:
        """Make the next global model and open the round after it."""
        counted = await self._parts.workers.in_store(self._parts.store.stored_updates, current)
        try:
            model = await self._parts.workers.on_disk(self._reduce, base, counted)
        except NonFiniteAggregate as error:
            return await self._fail_round(current, str(error)), base
        pass_by(FailPoint.MODEL_WRITTEN)
        self._last_counted.update({one.client_id: one.update.order_id for one in counted})
        following = None
        if current.round_number < self._parts.settings.rounds:
            following = self._plan(current.round_number + 1, attempt=1, base=model)
        happened = [event_of("round-done", current, updates=len(counted), model=model.digest)]
        if following is not None:
            happened.append(_opened(following))
        await self._parts.workers.in_store(
            self._parts.store.finish_round,
            current,
            model_digest=model.digest,
            counted=counted,
            client_evaluation=summarise_clients([one.update for one in counted]),
            next_round=following,
            happened=happened,
        )
        pass_by(FailPoint.ROUND_DONE)
        if following is not None:
            self._hand_out(following, model)
        for one in happened:
            self._parts.bus.publish(one)
        if not self._parts.settings.keep_updates:
            for stored in counted:
                await self._parts.workers.on_disk(
                    self._parts.spool.drop, stored.update.order_id, stored.update.digest
                )
        await self._start_evaluation(current, model.digest)
        return following or await self._latest(), model

    def _reduce(self, base: GlobalModel, counted: list[StoredUpdate]) -> GlobalModel:
        updates = []
        for stored in counted:
            path = self._parts.spool.path(stored.update.order_id, stored.update.digest)
            updates.append(
                StateFile(
                    path=path,
                    layout=read_layout(path),
                    num_examples=stored.update.num_examples,
                )
            )
        blocks = self._strategy.aggregator(base.file, updates, self._parts.kinds)
        return self._parts.checkpoints.save(base.file, blocks)

    async def _fail_round(self, current: Round, reason: str) -> Round:
        happened = event_of(IncidentKind.ROUND_FAILED, current, is_incident=True, reason=reason)
        await self._parts.workers.in_store(self._parts.store.fail_round, current, happened)
        self._parts.book.close_round()
        self._parts.bus.publish(happened)
        if not self._parts.settings.keep_updates:
            await self._parts.workers.on_disk(self._parts.spool.drop_all_but, set())
        return await self._latest()

    async def _fail_run(self, current: Round) -> None:
        happened = event_of("run-failed", current, is_incident=True)
        await self._parts.workers.in_store(
            self._parts.store.end_run, self._parts.run.run_id, RunState.FAILED, happened
        )
        raise RunFailed(
            f"round {current.round_number} failed {current.attempt} times; "
            "see why with `python -m fedserver history --state-dir "
            f"{self._parts.settings.state_dir}`"
        )

    async def _latest(self) -> Round:
        latest = await self._parts.workers.in_store(
            self._parts.store.latest_round, self._parts.run.run_id
        )
        assert latest is not None
        return latest

    # ---- evaluation

    async def _start_evaluation(self, evaluated: Round, digest: str) -> None:
        """Evaluate beside the round that collects; at most one evaluation is behind."""
        await self._evaluation_done()
        if self._evaluator.has_data:
            self._evaluating = asyncio.create_task(self._evaluate(evaluated, digest))

    async def _evaluation_done(self) -> None:
        if self._evaluating is not None:
            await self._evaluating
            self._evaluating = None

    async def _evaluate(self, evaluated: Round, digest: str) -> None:
        try:
            found = await self._parts.workers.on_disk(
                self._evaluator.evaluate, self._parts.checkpoints.path(digest)
            )
        except EvaluationStopped:
            return
        pass_by(FailPoint.EVALUATED)
        has_collapsed = not math.isfinite(found.loss)
        numbers = {"accuracy": found.accuracy, "loss": found.loss, **found.metrics}
        # JSON has no NaN.
        fields: dict[str, Any] = {
            name: one if math.isfinite(one) else None for name, one in numbers.items()
        }
        by_class: dict[str, Any] = {}
        if found.confusion is not None:
            by_class = {
                "class_accuracy": class_accuracies(found.confusion),
                "confusion": found.confusion.tolist(),
            }
        happened = event_of(
            IncidentKind.EVALUATION_COLLAPSED if has_collapsed else "evaluated",
            evaluated,
            is_incident=has_collapsed,
            **fields,
        )
        await self._parts.workers.in_store(
            self._parts.store.record_evaluation,
            evaluated,
            fields | by_class,
            happened,
        )
        self._parts.bus.publish(happened)


def _opened(opened: Round) -> Event:
    return event_of("round-opened", opened, clients=len(opened.orders))

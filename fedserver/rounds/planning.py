"""The next round: the clients it asks, their orders, and the limits of their updates."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from fedrounds.seeds import derive_seed
from fedrounds.strategies.components import ClientAlgorithm, Strategy
from fedrounds.types import CONTROL_SECTION, MODEL_SECTION, Section, WorkOrder
from fedserver.clients.open_orders import OpenOrder
from fedserver.clients.sampling import (
    RESTS_ON_THE_PAST,
    Candidate,
    choose_cohort,
    cohort_seed,
)
from fedserver.models.checkpoints import GlobalModel
from fedserver.phases import OrderState, Phase
from fedserver.quorum import clients_to_ask, clients_to_open
from fedserver.records import Adjustments, Attempt, Exclusion, Order, Participation, Suspension
from fedserver.rounds.adjustments import adjusted
from fedserver.run_context import RunContext
from fedserver.run_settings import run_compression
from fedserver.settings import ServerSettings
from fedserver.suspension import after_exclusion, eligible_clients
from fedserver.updates.admission import AdmissionLimits


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The clients that are here at this moment, and the facts that a cohort is chosen by.

    `num_examples` holds the size of each client's data, `orders` the orders of the round that
    collects; `past` may be empty where the cohort doesn't rest on it (see `rests_on_past`).
    """

    ready: Set[int]
    num_examples: Mapping[int, int]
    orders: Sequence[OpenOrder]
    suspensions: Mapping[int, Suspension]
    past: Mapping[int, Participation]


def rests_on_past(settings: ServerSettings) -> bool:
    """Return whether cohorts are chosen by what clients have done so far in the run."""
    return settings.cohort in RESTS_ON_THE_PAST


def plan_round(
    context: RunContext,
    round_number: int,
    *,
    attempt: int,
    base: GlobalModel,
    adjustments: Adjustments,
    clients: Clients,
    max_at_work: int,
) -> Attempt | None:
    """Return the round to open, or None while there are too few clients.

    `max_at_work` is how many may be at work in it, with those whose orders go on; 0: all.
    """
    settings, run_id = context.settings, context.run_id
    if len(clients.ready) < clients_to_open(settings):
        return None
    at_work = _carried_clients(settings, clients.orders, round_number)
    eligible = eligible_clients(
        clients.ready - at_work,
        clients.suspensions,
        round_number=round_number,
        num_needed=clients_to_ask(settings) - len(at_work),
    )
    cohort = _chosen(
        settings,
        eligible,
        clients,
        size=_num_wanted(max_at_work, len(at_work), of=len(eligible)),
        seed=cohort_seed(settings.seed, round_number=round_number, attempt=attempt),
    )
    if settings.straggler_work == "none":
        stragglers = draw_stragglers(cohort, settings, round_number=round_number, attempt=attempt)
        cohort = (
            tuple(client_id for client_id in cohort if client_id not in stragglers) or cohort[:1]
        )
    return Attempt(
        run_id=run_id,
        round_number=round_number,
        attempt=attempt,
        phase=Phase.COLLECTING,
        base_digest=base.digest,
        base_bytes=base.file.layout.size_bytes,
        base_state_digest=base.state_digest,
        max_delta_norm=settings.max_delta_norm or 100 * (1 + base.parameter_norm),
        adjustments=adjustments,
        orders=tuple(
            Order(
                order_id=_order_id(run_id, round_number, attempt, client_id),
                client_id=client_id,
                num_examples=clients.num_examples[client_id],
            )
            for client_id in cohort
        ),
    )


def idle_clients(ready: Set[int], orders: Sequence[OpenOrder]) -> Set[int]:
    """Return the ready clients that an asynchronous round may give another order.

    They aren't at work, and none of their orders has ended in the round without an update.
    """
    return ready - {
        order.order.client_id for order in orders if order.state is not OrderState.STORED
    }


def plan_more(context: RunContext, collecting: Attempt, clients: Clients) -> tuple[Order, ...]:
    """Return further orders, so that --concurrency clients are at work.

    A client gets a second order in a round only where no client without an update in it is idle.
    """
    settings = context.settings
    eligible = eligible_clients(
        idle_clients(clients.ready, clients.orders),
        clients.suspensions,
        round_number=collecting.round_number,
        num_needed=0,
    )
    has_given = {
        order.order.client_id for order in clients.orders if order.state is OrderState.STORED
    }
    num_open = sum(order.state is OrderState.OPEN for order in clients.orders)
    chosen: list[int] = []
    for group in (eligible - has_given, eligible & has_given):
        chosen += _chosen(
            settings,
            group,
            clients,
            size=_num_wanted(settings.concurrency, num_open + len(chosen), of=len(group)),
            # Another seed for each draw: the number of orders that were given before it.
            seed=derive_seed(
                settings.seed,
                "refill",
                round_number=collecting.round_number,
                attempt=collecting.attempt,
                client_id=len(collecting.orders) + len(chosen),
            ),
        )
    num_before = Counter(order.client_id for order in collecting.orders)
    return tuple(
        Order(
            order_id=_order_id(
                collecting.run_id,
                collecting.round_number,
                collecting.attempt,
                client_id,
                sequence=num_before[client_id] + 1,
            ),
            client_id=client_id,
            num_examples=clients.num_examples[client_id],
        )
        for client_id in chosen
    )


def stale_before(settings: ServerSettings, round_number: int) -> int:
    """Return the first round whose orders aren't too stale for an asynchronous round."""
    return 0 if settings.max_staleness is None else round_number - settings.max_staleness


def _carried_clients(
    settings: ServerSettings, orders: Sequence[OpenOrder], round_number: int
) -> set[int]:
    """Return the clients whose open orders go on in a round that is to open."""
    oldest = stale_before(settings, round_number)
    return {
        order.order.client_id
        for order in orders
        if order.state is OrderState.OPEN and order.order.round_number >= oldest
    }


def _num_wanted(max_at_work: int, num_at_work: int, *, of: int) -> int:
    """Return the number of clients to ask beside those at work, of `of` clients."""
    return max(0, min(of, max_at_work - num_at_work)) if max_at_work else of


def _chosen(
    settings: ServerSettings, eligible: Set[int], clients: Clients, *, size: int, seed: int
) -> tuple[int, ...]:
    if not size:
        return ()
    return choose_cohort(
        [
            Candidate(
                client_id=client_id,
                num_examples=clients.num_examples[client_id],
                past=clients.past.get(client_id, Participation()),
            )
            for client_id in eligible
        ],
        size=size,
        seed=seed,
        cohort=settings.cohort,
        num_drawn=settings.cohort_candidates,
    )


def _order_id(
    run_id: str, round_number: int, attempt: int, client_id: int, *, sequence: int = 1
) -> str:
    return f"{run_id}-r{round_number}-a{attempt}-c{client_id}-s{sequence}"


def admission_limits(
    settings: ServerSettings, opened: Attempt, *, strategy: Strategy
) -> AdmissionLimits:
    """Return the bounds that were frozen when a round opened."""
    algorithm = strategy.client_algorithm
    has_control = algorithm is not None and algorithm.sends_control
    rate = settings.lr * opened.adjustments.lr_factor
    return AdmissionLimits(
        max_num_examples=settings.max_num_examples,
        max_delta_norm=opened.max_delta_norm,
        max_steps_per_example=settings.epochs,
        compression=run_compression(settings),
        sections=(MODEL_SECTION, CONTROL_SECTION) if has_control else (MODEL_SECTION,),
        # A mean gradient that were longer would lead beyond the cap in a single step.
        max_control_norm=opened.max_delta_norm / rate,
        unmet=strategy.unmet,
    )


def draw_stragglers(
    cohort: Sequence[int], settings: ServerSettings, *, round_number: int, attempt: int
) -> dict[int, int]:
    """Return the number of epochs for each straggler of a cohort, drawn evenly from 1 to all.

    So the experiments of Li et al. 2020 (FedProx), section 5.2, have it: "systems heterogeneity".
    """
    num_stragglers = round(settings.stragglers * len(cohort))
    draws = random.Random(
        derive_seed(settings.seed, "stragglers", round_number=round_number, attempt=attempt)
    )
    chosen = sorted(draws.sample(sorted(cohort), num_stragglers))
    return {client_id: draws.randint(1, settings.epochs) for client_id in chosen}


def work_orders(
    settings: ServerSettings,
    opened: Attempt,
    base: GlobalModel,
    last_counted: Mapping[int, str],
    *,
    algorithm: ClientAlgorithm | None,
) -> list[WorkOrder]:
    """Return the work orders of a round.

    `last_counted` has the id of each client's last order that counted.
    """
    sections = [
        Section(name=MODEL_SECTION, digest=base.digest, size_bytes=base.file.layout.size_bytes)
    ]
    state = base.server_state
    if algorithm is not None and algorithm.sends_control and state is not None:
        size_bytes = state.file.layout.size_bytes
        sections.append(Section(name=CONTROL_SECTION, digest=state.digest, size_bytes=size_bytes))
    training = replace(
        adjusted(settings.training_in(opened.round_number), opened.adjustments),
        client_algorithm=None if algorithm is None else algorithm.config,
    )
    epochs: Mapping[int, int] = {}
    if settings.straggler_work == "partial":
        epochs = draw_stragglers(
            [order.client_id for order in opened.orders],
            settings,
            round_number=opened.round_number,
            attempt=opened.attempt,
        )
    return [
        WorkOrder(
            order_id=order.order_id,
            client_id=order.client_id,
            round_number=opened.round_number,
            attempt=opened.attempt,
            sections=tuple(sections),
            training=replace(training, epochs=epochs.get(order.client_id, training.epochs)),
            seed=derive_seed(
                settings.seed,
                "train" if order.sequence == 1 else f"train-{order.sequence}",
                round_number=opened.round_number,
                attempt=opened.attempt,
                client_id=order.client_id,
            ),
            last_counted_order_id=last_counted.get(order.client_id, ""),
            evaluate=settings.evaluate_on_clients,
            holdout=settings.holdout,
        )
        for order in opened.orders
    ]


def suspensions_after(
    suspensions: Mapping[int, Suspension],
    finished: Attempt,
    exclusions: Sequence[Exclusion],
    counted: Set[int],
) -> dict[int, Suspension]:
    """Return the suspensions once a round is recorded as done; `counted` are client ids."""
    after = {
        client_id: suspension
        for client_id, suspension in suspensions.items()
        if client_id not in counted
    }
    for exclusion in exclusions:
        after[exclusion.client_id] = after_exclusion(
            suspensions.get(exclusion.client_id),
            client_id=exclusion.client_id,
            round_number=finished.round_number,
            reason=exclusion.refusal.reason,
        )
    return after

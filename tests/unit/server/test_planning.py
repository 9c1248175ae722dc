"""Whom a round asks: who is here, isn't suspended, isn't at work; so many as the settings say."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from fedserver.clients.open_orders import OpenOrder, OpenRound
from fedserver.models.checkpoints import GlobalModel
from fedserver.phases import OrderState
from fedserver.quorum import cohort_size
from fedserver.records import NO_ADJUSTMENTS, Attempt, Exclusion, Refusal, Run, RunState, Suspension
from fedserver.rounds.planning import (
    Clients,
    draw_stragglers,
    idle_clients,
    plan_more,
    plan_round,
    stale_before,
    suspensions_after,
    work_orders,
)
from fedserver.run_context import RunContext, strategy_of
from fedserver.settings import ServerSettings
from tests.factories import (
    TinyNet,
    make_event,
    make_limits,
    make_order,
    make_round,
    write_state,
)


@pytest.fixture
def base(tmp_path: Path) -> GlobalModel:
    """Give a model that rounds begin with."""
    file = write_state(tmp_path, TinyNet().state_dict())
    return GlobalModel(digest="ab" * 32, file=file, parameter_norm=3.0)


def make_context(**settings: object) -> RunContext:
    """Return the facts of a run with these settings."""
    chosen = ServerSettings.model_validate({"task": "tests.tiny_task:tiny", **settings})
    recorded = chosen.run_settings()
    return RunContext(
        settings=chosen,
        run=Run(run_id="run1", number=1, settings=recorded, state=RunState.OPEN),
        strategy=strategy_of(chosen),
        kinds={},
        ties={},
        variances=frozenset(),
        modules=set(),
    )


def make_clients(
    ready: Iterable[int],
    *,
    orders: Iterable[OpenOrder] = (),
    suspensions: Mapping[int, Suspension] | None = None,
) -> Clients:
    """Return clients that are here, client N with 10 + N examples."""
    here = set(ready)
    return Clients(
        ready=here,
        num_examples={client_id: 10 + client_id for client_id in here},
        orders=list(orders),
        suspensions=suspensions or {},
        past={},
    )


def suspended(client_id: int, *, until: int) -> dict[int, Suspension]:
    """Return the suspension of a client that sits out."""
    return {
        client_id: Suspension(client_id=client_id, strikes=1, suspended_until=until, reason="test")
    }


def make_open_order(base: GlobalModel, client_id: int, state: OrderState) -> OpenOrder:
    """Return a client's order of round 1."""
    given_in = OpenRound(record=make_round(), base=base, limits=make_limits(), opened_at=0)
    order = make_order(f"run1-r1-a1-c{client_id}-s1", client_id=client_id)
    return OpenOrder(order=order, given_in=given_in, state=state, advanced_at=0)


def plan(
    context: RunContext, base: GlobalModel, clients: Clients, *, round_number: int = 1
) -> Attempt | None:
    """Return the first attempt at a round."""
    settings = context.settings
    return plan_round(
        context,
        round_number,
        attempt=1,
        base=base,
        adjustments=NO_ADJUSTMENTS,
        clients=clients,
        max_at_work=cohort_size(settings) or settings.concurrency,
    )


def asked(planned: Attempt | None) -> list[int]:
    """Return whom a round asks."""
    assert planned is not None
    return [order.client_id for order in planned.orders]


def test_all_that_are_here_are_asked_each_with_the_size_of_its_data(base: GlobalModel) -> None:
    """Without a cohort's size; order ids say run, round, attempt and client."""
    planned = plan(make_context(min_clients=2), base, make_clients({0, 2}))
    assert planned is not None
    assert [(order.order_id, order.num_examples) for order in planned.orders] == [
        ("run1-r1-a1-c0-s1", 10),
        ("run1-r1-a1-c2-s1", 12),
    ]


def test_no_round_opens_while_there_are_too_few_clients(base: GlobalModel) -> None:
    """--min-clients says how many are needed."""
    context = make_context(min_clients=3)
    assert plan(context, base, make_clients({0, 1})) is None
    assert asked(plan(context, base, make_clients({0, 1, 2}))) == [0, 1, 2]


def test_suspended_clients_sit_out_unless_the_round_could_not_come(base: GlobalModel) -> None:
    """Client 1 is back in round 5, or where it is needed."""
    suspensions = suspended(1, until=5)
    clients = make_clients({0, 1, 2}, suspensions=suspensions)
    assert asked(plan(make_context(min_clients=2), base, clients, round_number=4)) == [0, 2]
    assert asked(plan(make_context(min_clients=2), base, clients, round_number=5)) == [0, 1, 2]
    assert asked(plan(make_context(min_clients=3), base, clients, round_number=4)) == [0, 1, 2]


def test_a_cohort_of_a_size_is_drawn_by_the_seed(base: GlobalModel) -> None:
    """The same again for the same seed, another for another round."""
    context = make_context(min_clients=2, clients_per_round=4, seed=7)
    clients = make_clients(range(40))
    cohorts = [asked(plan(context, base, clients, round_number=number)) for number in (1, 1, 2, 3)]
    assert [len(cohort) for cohort in cohorts] == [4] * 4
    assert cohorts[0] == cohorts[1]
    assert len({tuple(cohort) for cohort in cohorts}) == 3


def test_the_bound_of_a_delta_grows_with_the_model_unless_it_is_given(base: GlobalModel) -> None:
    """100 * (1 + norm of the global model), as the help says."""
    planned = [
        plan(make_context(min_clients=1, **given), base, make_clients({0}))
        for given in ({}, {"max_delta_norm": 2.5})
    ]
    assert [published and published.max_delta_norm for published in planned] == [400.0, 2.5]


def test_an_asynchronous_round_leaves_those_at_work_alone(base: GlobalModel) -> None:
    """Their orders go on; they fill --concurrency."""
    context = make_context(strategy="fedbuff", min_clients=1, concurrency=3)
    orders = [make_open_order(base, 0, OrderState.OPEN)]
    cohort = asked(plan(context, base, make_clients(range(5), orders=orders), round_number=2))
    assert len(cohort) == 2
    assert 0 not in cohort


def test_an_order_that_is_too_stale_is_not_at_work(base: GlobalModel) -> None:
    """With --max-staleness 0 an order of round 1 is over when round 2 opens."""
    context = make_context(strategy="fedbuff", min_clients=1, max_staleness=0)
    orders = [make_open_order(base, 0, OrderState.OPEN)]
    clients = make_clients(range(2), orders=orders)
    assert asked(plan(context, base, clients, round_number=2)) == [0, 1]
    assert asked(plan(context, base, clients, round_number=1)) == [1]
    assert stale_before(context.settings, 5) == 5


def test_idle_are_those_without_an_order_or_with_a_stored_update(base: GlobalModel) -> None:
    """Who has given up or was refused sits the round out."""
    states = [OrderState.OPEN, OrderState.STORED, OrderState.ABANDONED, OrderState.REFUSED]
    orders = [make_open_order(base, client_id, state) for client_id, state in enumerate(states)]
    assert idle_clients({0, 1, 2, 3, 4}, orders) == {1, 4}


def test_further_orders_go_first_to_those_without_an_update_in_the_round(
    base: GlobalModel,
) -> None:
    """One more order fits beside client 1's: client 2's; then client 0's second order."""
    orders = [
        make_open_order(base, 0, OrderState.STORED),
        make_open_order(base, 1, OrderState.OPEN),
    ]
    clients = make_clients({0, 1, 2}, orders=orders)
    collecting = make_round(clients=(0, 1))

    def more(concurrency: int) -> list[str]:
        context = make_context(strategy="fedbuff", min_clients=1, concurrency=concurrency)
        return [order.order_id for order in plan_more(context, collecting, clients)]

    assert more(1) == []
    assert more(2) == ["run1-r1-a1-c2-s1"]
    assert more(3) == ["run1-r1-a1-c2-s1", "run1-r1-a1-c0-s2"]


def test_stragglers_do_a_part_of_the_work_or_are_left_out(base: GlobalModel) -> None:
    """A share of the cohort, drawn by the seed; somebody is always asked."""
    half = {"min_clients": 4, "epochs": 4, "stragglers": 0.5}
    clients = make_clients(range(4))
    left_out = make_context(**half, straggler_work="none")
    assert len(asked(plan(left_out, base, clients))) == 2
    all_out = make_context(**half | {"stragglers": 1}, straggler_work="none")
    assert asked(plan(all_out, base, clients)) == [0]
    partial = make_context(**half, straggler_work="partial")
    opened = make_round(clients=(0, 1, 2, 3))
    epochs = draw_stragglers((0, 1, 2, 3), partial.settings, round_number=1, attempt=1)
    assert len(epochs) == 2
    orders = work_orders(partial.settings, opened, base, {}, algorithm=None)
    assert {order.client_id: order.training.epochs for order in orders} == {
        client_id: epochs.get(client_id, 4) for client_id in range(4)
    }


def test_stragglers_that_send_nothing_leave_whole_orders_to_the_others(base: GlobalModel) -> None:
    """The others do all epochs, also where a server that starts again makes their orders again."""
    context = make_context(min_clients=4, epochs=4, stragglers=0.5, straggler_work="none")
    planned = plan(context, base, make_clients(range(4)))
    assert planned is not None
    assert len(planned.orders) == 2
    orders = work_orders(context.settings, planned, base, {}, algorithm=None)
    assert [order.training.epochs for order in orders] == [4, 4]


def test_an_excluded_client_sits_out_before_that_is_recorded() -> None:
    """And one whose update counts is back at once, with no strike."""
    before = suspended(1, until=9) | suspended(2, until=9)
    exclusion = Exclusion(
        order_id="order",
        client_id=3,
        refusal=Refusal(reason="too long", evidence={}),
        kept_bytes=0,
        event=make_event("update-excluded"),
    )
    after = suspensions_after(before, make_round(round_number=5), [exclusion], {1})
    assert {client_id: suspension.suspended_until for client_id, suspension in after.items()} == {
        2: 9,
        3: 7,
    }
    assert (after[3].strikes, after[3].reason) == (0, "too long")

"""Where a round closes: closed, finished or failed, each with what the store says afterwards."""

import asyncio
from pathlib import Path

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.components import UnfitCohort, WeightedAggregator
from fedrounds.strategies.means import Weights, mean_by
from fedrounds.types import Receipt, RunFailure
from fedserver.models.checkpoints import GlobalModel
from fedserver.phases import OrderState, Phase
from fedserver.records import Attempt
from tests.server_run import ServerRun, serving


def never_fits() -> WeightedAggregator:
    """Return a strategy that no cohort fits; a server imports it from here."""

    def weigh(_: Cohort) -> Weights:
        raise UnfitCohort("no cohort fits")

    return WeightedAggregator(aggregator=mean_by(weigh))


async def close_with(server: ServerRun, *client_ids: int) -> tuple[Attempt, GlobalModel]:
    """Begin with clients 0, 1 and 2, let these answer, and close the round."""
    current, base = await server.begin(0, 1, 2)
    for client_id in client_ids:
        await server.answer(client_id, shift=0.01 * (client_id + 1))
    return await server.closer.close(current), base


def test_no_update_comes_into_a_round_that_is_closed(tmp_path: Path) -> None:
    """What was open is LATE, in the store and for its client; what was stored stays."""

    async def close(server: ServerRun) -> None:
        opened, _ = await server.begin(0, 1, 2)
        order = server.order_of(2)
        payload = server.payload_of(order)
        await server.answer(0)
        closed = await server.closer.close(opened)
        assert closed.phase is Phase.AGGREGATING
        late = await server.upload(server.session_ids[2], order, payload)
        assert late.receipt is Receipt.LATE
        assert server.states(closed) == {0: "STORED", 1: "LATE", 2: "LATE"}
        assert server.open_orders.list_all() == []

    with serving(tmp_path, min_clients=3, min_updates=1) as server:
        asyncio.run(close(server))


def test_a_finished_round_has_a_model_and_a_round_after_it(tmp_path: Path) -> None:
    """The model is durable, verdicts are recorded, clients get their next orders at once."""

    async def finish(server: ServerRun) -> None:
        closed, base = await close_with(server, 0, 2)
        following, model = await server.closer.finish(closed, base)
        assert server.states(closed) == {0: "COUNTED", 1: "LATE", 2: "COUNTED"}
        assert server.checkpoints.path(model.digest).exists()
        assert (following.round_number, following.attempt) == (2, 1)
        assert following == server.latest()
        assert following.base_digest == model.digest != base.digest
        # Its clients' next orders name the orders that counted.
        counted = {order.client_id: order.order_id for order in closed.orders}
        named = {number: server.order_of(number).last_counted_order_id for number in (0, 1, 2)}
        assert named == {0: counted[0], 1: "", 2: counted[2]}
        kinds = server.kinds_of_events()
        assert kinds.index("round-done") < kinds.index("round-opened", kinds.index("round-done"))
        await server.evaluations.done()

    with serving(tmp_path, min_clients=3, min_updates=1) as server:
        asyncio.run(finish(server))


def test_the_last_round_has_none_after_it(tmp_path: Path) -> None:
    """It is the attempt that the run ends with."""

    async def finish(server: ServerRun) -> None:
        closed, base = await close_with(server, 0)
        done, model = await server.closer.finish(closed, base)
        assert (done.round_number, done.phase, done.model_digest) == (1, Phase.DONE, model.digest)
        await server.evaluations.done()

    with serving(tmp_path, min_clients=3, min_updates=1, rounds=1) as server:
        asyncio.run(finish(server))


def test_a_model_is_the_mean_of_what_counted(tmp_path: Path) -> None:
    """Finished anew after a kill it has the same bytes: nothing depends on when it is made."""

    async def finish(server: ServerRun) -> str:
        closed, base = await close_with(server, 0, 1)
        _, model = await server.closer.finish(closed, base)
        await server.evaluations.done()
        return model.digest

    digests = set()
    for name in ("first", "second"):
        with serving(tmp_path / name, min_clients=3, min_updates=1, rounds=1) as server:
            digests.add(asyncio.run(finish(server)))
    assert len(digests) == 1


def test_nothing_is_made_of_a_base_that_may_be_bad(tmp_path: Path) -> None:
    """The round comes back as it was; the loop looks at the base first."""

    async def finish(server: ServerRun) -> None:
        closed, base = await close_with(server, 0)
        server.evaluations.suspect_model()
        assert await server.closer.finish(closed, base) == (closed, base)
        assert server.latest().phase is Phase.AGGREGATING

    with serving(tmp_path, min_clients=3, min_updates=1) as server:
        asyncio.run(finish(server))


def test_a_round_fails_of_which_too_few_updates_are_left(tmp_path: Path) -> None:
    """The reason names the client whose update was excluded; it sits out the next attempt."""

    async def finish(server: ServerRun) -> None:
        current, base = await server.begin(0, 1, 2, 3, 4)
        for client_id in range(5):
            await server.answer(client_id, shift=3.0 if client_id == 4 else 0.001)
        closed = await server.closer.close(current)
        failed, same = await server.closer.finish(closed, base)
        assert (failed.phase, same) == (Phase.FAILED, base)
        assert server.states(closed)[4] == OrderState.EXCLUDED
        assert server.states(closed)[0] == OrderState.ABANDONED
        reason, failure = server.store.events.last_failure(server.run.run_id)
        assert failure is RunFailure.TOO_MANY_EXCLUDED
        assert reason.startswith("1 of 5 updates were excluded, too many to go on; the update of ")
        assert "client 4 was excluded: the update is " in reason
        assert list(server.store.quarantine.suspensions(server.run.run_id)) == [4]
        assert server.last_counted.order_ids == {}

    with serving(tmp_path, min_clients=5, min_updates=5, norm_band=3) as server:
        asyncio.run(finish(server))


def test_an_aggregate_that_is_not_finite_fails_the_round(tmp_path: Path) -> None:
    """The next attempt has half the rate; the base model stands."""

    async def finish(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        for client_id in (0, 1):
            # Each is finite and within the cap; their server step isn't.
            await server.answer(client_id, shift=1e38)
        closed = await server.closer.close(current)
        failed, same = await server.closer.finish(closed, base)
        assert (failed.phase, same) == (Phase.FAILED, base)
        assert failed.adjustments_after.lr_factor == 0.5
        assert server.store.events.last_failure(server.run.run_id)[1] is RunFailure.NOT_AGGREGATED
        assert server.states(closed) == {0: "ABANDONED", 1: "ABANDONED"}

    with serving(
        tmp_path,
        min_clients=2,
        norm_band=0,
        max_delta_norm=1e300,
        strategy="fedavgm",
        strategy_parameters={"server_lr": 10.0},
    ) as server:
        asyncio.run(finish(server))


def test_a_cohort_that_a_strategy_cannot_take_fails_the_round(tmp_path: Path) -> None:
    """The reason is the strategy's own. The rate stays: no model was bad."""

    async def finish(server: ServerRun) -> None:
        closed, base = await close_with(server, 0)
        failed, _ = await server.closer.finish(closed, base)
        assert failed.phase is Phase.FAILED
        assert failed.adjustments_after == failed.adjustments
        assert server.store.events.last_failure(server.run.run_id) == (
            "no cohort fits",
            RunFailure.NOT_AGGREGATED,
        )

    strategy = "tests.unit.server.test_closing:never_fits"
    with serving(tmp_path, min_clients=3, min_updates=1, strategy=strategy) as server:
        asyncio.run(finish(server))


def test_a_failed_attempt_takes_its_orders_with_it(tmp_path: Path) -> None:
    """Nothing of it counts; its reason and kind are on record."""

    async def fail(server: ServerRun) -> None:
        current, _ = await server.begin(0, 1, 2)
        await server.answer(0)
        failed = await server.closer.fail(current, "why", failure=RunFailure.TOO_FEW_UPDATES)
        assert failed.phase is Phase.FAILED
        assert server.states(current) == dict.fromkeys((0, 1, 2), "ABANDONED")
        assert server.open_orders.list_all() == []
        assert server.store.events.last_failure(server.run.run_id) == (
            "why",
            RunFailure.TOO_FEW_UPDATES,
        )
        assert not server.evaluations.has_news

    with serving(tmp_path, min_clients=3, min_updates=1) as server:
        asyncio.run(fail(server))

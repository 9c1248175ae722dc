"""Updates that a strategy can't be applied to: their sender's fault, or in words the attempt's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.components import UnfitCohort, WeightedAggregator
from fedrounds.strategies.means import Weights, mean_by
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import Peer, changed, entry_of, open_round, payload_of
from tests.processes import Scene

GOOD: dict[str, Any] = {"metrics": {"loss": 0.5, "accuracy": 0.75, "global_loss": 1.5}}


def at_most_10() -> WeightedAggregator:
    """Mean of clients that have at most 10 examples each; the server imports it from here."""

    def weigh(cohort: Cohort) -> Weights:
        most = max(update.num_examples for update in cohort.updates)
        if most > 10:
            raise UnfitCohort(f"a client has {most} examples")
        return Weights([1] * len(cohort.updates), len(cohort.updates))

    return WeightedAggregator(aggregator=mean_by(weigh))


@contextmanager
def two_peers(scene: Scene, *flags: str | int) -> Iterator[dict[int, Peer]]:
    """Give two clients of a server with these flags."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, *flags),
        *("--farewell", 0, "--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peers = {client_id: Peer(server.address, client_id) for client_id in (0, 1)}
    yield peers
    for peer in peers.values():
        peer.close()


@pytest.mark.parametrize(
    ("strategy", "bad", "words"),
    [
        ("qfedavg", {}, "qfedavg needs each client's loss of the global model"),
        ("qfedavg", {"metrics": {"global_loss": 1e20}}, "no weight for a loss"),
        ("fednova", {"num_steps": 0}, "fednova divides by the local steps"),
    ],
)
def test_an_update_that_the_strategy_cant_weigh_is_refused_and_the_round_goes_on(
    scene: Scene, strategy: str, bad: dict[str, Any], words: str
) -> None:
    """One client that doesn't say what its weight rests on never fails the others' round."""
    parameters = ("--strategy-parameters", "q=20") if strategy == "qfedavg" else ()
    flags = ("--strategy", strategy, *parameters, "--evaluate-on-clients", "--min-updates", 1)
    with two_peers(scene, *flags) as peers:
        opened = open_round(peers)
        payload = payload_of(changed(opened.base))
        answer = peers[0].upload(opened.orders[0], payload, **bad)
        assert answer.receipt == pb.RECEIPT_REFUSED
        assert words in answer.reason
        assert peers[1].upload(opened.orders[1], payload, **GOOD).receipt == pb.RECEIPT_STORED
        assert peers[1].pull_order().round == 2
    entry = entry_of(scene.history(), opened.orders[0])
    assert (entry["phase"], entry["attempt"]) == ("DONE", 1)
    assert [update["verdict"] for update in entry["updates"]] == ["REFUSED", "COUNTED"]


def test_a_round_whose_updates_dont_fit_the_strategy_fails_and_is_tried_again(
    scene: Scene,
) -> None:
    """What only the cohort shows fails the attempt, with the strategy's own words."""
    row = f"{__name__}:at_most_10"
    with two_peers(scene, "--strategy", row) as peers:
        for num_examples in (11, 10):
            opened = open_round(peers)
            for client_id, peer in peers.items():
                payload = payload_of(changed(opened.base))
                peer.upload(opened.orders[client_id], payload, num_examples=num_examples)
        assert open_round(peers).orders[0].round == 2
    first, second, _ = scene.history()
    assert (first["phase"], second["phase"]) == ("FAILED", "DONE")
    (incident,) = first["incidents"]
    assert (incident["kind"], incident["reason"]) == ("round-failed", "a client has 11 examples")


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [("fednova", ""), ("bucketing+median", "size=2"), ("qfedavg", "q=1")],
)
def test_what_a_row_rests_on_reaches_it(scene: Scene, strategy: str, parameters: str) -> None:
    """Steps, seeds and losses: verify makes the model from them again."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1, "--min-clients", 5, "--seed", 5),
        *("--strategy", strategy, *(("--strategy-parameters", parameters) if parameters else ())),
        *("--evaluate-on-clients", "--norm-band", 0, "--farewell", 0, "--keep-updates", "all"),
        *("--stall-after", 3600, "--lease", 3600),
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in range(5)}
    opened = open_round(peers)
    for client_id, peer in peers.items():
        metrics = {"global_loss": 0.5 + client_id, "global_accuracy": 0.5}
        answer = peer.upload(
            opened.orders[client_id],
            payload_of(changed(opened.base, 0.01 * (1 + client_id) ** 2)),
            num_steps=1 + 3 * client_id,
            metrics={"loss": 0.5, "accuracy": 0.75, **metrics},
        )
        assert answer.receipt == pb.RECEIPT_STORED, answer.reason
    assert server.wait() == 0
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.endswith("1 of 1 re-aggregated\n")
    for peer in peers.values():
        peer.close()

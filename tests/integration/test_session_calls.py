"""Register and PullWork: who is who, and how orders are handed out."""

from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from fedclient.connection import Connection
from fedclient.routes import Route
from fedrounds.types import Registration
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.conftest import MAX_NUM_EXAMPLES, History
from tests.integration.peer import (
    OpenRound,
    Peer,
    each_method,
    entry_of,
    expect_status,
    open_round,
)
from tests.processes import Scene, Server

NOT_A_SESSION = "no-such-session"


def test_the_same_instance_takes_its_session_over_at_once(stranger: Peer) -> None:
    """A client that was killed and started again is given the session it had."""
    first = stranger.register()
    assert stranger.register().session_id == first.session_id
    assert first.task == "tests.tiny_task:tiny"
    assert first.total_rounds == 100_000
    assert first.partitioning.scheme == "iid"


def test_another_instance_is_refused_an_id_in_use(stranger: Peer) -> None:
    """Two state-dirs with one id are a mistake: the second process is refused with a sentence."""
    mine = stranger.register()
    details = expect_status(
        grpc.StatusCode.ALREADY_EXISTS, lambda: stranger.register(instance_key="another")
    )
    assert "client id 60 is in use by another process" in details
    assert stranger.register().session_id == mine.session_id


def test_an_instance_that_serves_other_ids_now_gives_up_its_old_session(server: Server) -> None:
    """A session that overlaps with an older one of the same instance replaces it."""
    peer = Peer(server.address, 61, num_examples=0)
    peer.session_id = peer.register(client_ids=[61, 62]).session_id
    assert peer.pull(wait_s=0).state == pb.WORK_STATE_WAIT
    newer = peer.register(client_ids=[62, 63]).session_id
    expect_status(grpc.StatusCode.UNAUTHENTICATED, lambda: peer.pull(wait_s=0))
    peer.session_id = newer
    assert peer.pull(wait_s=0).state == pb.WORK_STATE_WAIT


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"client_ids": []}, "client_ids has 0 values; it must have from 1 to 10000"),
        ({"client_ids": [7, 7]}, "client id 7 is given twice"),
        ({"client_ids": [-1]}, "client_ids is -1; it must be from 0 to 9007199254740992"),
        ({"client_ids": [2**60]}, "client_ids is 1152921504606846976"),
        ({"instance_key": ""}, "instance_key has 0 characters; it must have from 1 to 128"),
        ({"instance_key": "k" * 129}, "instance_key has 129 characters"),
        ({"num_examples": [5, 5]}, "2 data sizes for 1 client ids"),
        ({"client_ids": range(10_001)}, "client_ids has 10001 values"),
        ({"client_ids": range(2**30, 2**30 + 250_000)}, "it may have 1048576"),
        ({"software_version": "v" * 129}, "software_version has 129 characters"),
        ({"capabilities": ["c" * 129]}, "capabilities has 129 characters"),
        ({"capabilities": ["c"] * 65}, "capabilities has 65 values"),
        ({"num_examples": [0]}, "has 0 examples; this run takes clients with 1 to 1000"),
        ({"num_examples": [-5]}, "has -5 examples"),
        ({"num_examples": [MAX_NUM_EXAMPLES + 1]}, "has 1001 examples"),
        ({"num_examples": [2**63 - 1]}, "has 9223372036854775807 examples"),
    ],
)
def test_a_malformed_registration_is_refused_with_a_sentence(
    stranger: Peer, changes: dict[str, Any], sentence: str
) -> None:
    """Nothing impossible gets a session, and the answer says what is impossible."""
    details = expect_status(grpc.StatusCode.INVALID_ARGUMENT, lambda: stranger.register(**changes))
    assert sentence in details


def test_the_refusal_of_a_client_of_another_task_has_both_names(stranger: Peer) -> None:
    """A client that insists on a task other than the run's learns which is which."""
    details = expect_status(
        grpc.StatusCode.FAILED_PRECONDITION, lambda: stranger.register(task="mnist-sample")
    )
    assert "tests.tiny_task:tiny" in details
    assert "mnist-sample" in details


def test_an_unknown_session_is_sent_to_register(opened: OpenRound, server: Server) -> None:
    """Every call with a session the server doesn't know answers UNAUTHENTICATED."""
    peer = Peer(server.address, 64, num_examples=0)
    peer.session_id = NOT_A_SESSION
    order = opened.orders[0]
    for name, call in each_method(peer, order.order_id, order.sections[0].digest):
        details = expect_status(grpc.StatusCode.UNAUTHENTICATED, call)
        assert "register again" in details, name


def test_an_order_of_another_client_is_not_found(opened: OpenRound) -> None:
    """No session may deliver, ask about or report on what others were given."""
    order = opened.orders[1]
    calls = dict(each_method(opened.peers[0], order.order_id, order.sections[0].digest))
    for name in ("UploadUpdate", "QueryUpload", "ReportProgress"):
        details = expect_status(grpc.StatusCode.NOT_FOUND, calls[name])
        assert order.order_id in details, name
    assert opened.settle(1) == [pb.RECEIPT_STORED]


def test_an_order_nobody_was_given_is_not_found(opened: OpenRound) -> None:
    """An order id that was made up is NOT_FOUND for every call that names one."""
    digest = opened.orders[0].sections[0].digest
    calls = dict(each_method(opened.peers[0], "run9-r1-a1-c0-s1", digest))
    for name in ("UploadUpdate", "QueryUpload", "ReportProgress"):
        details = expect_status(grpc.StatusCode.NOT_FOUND, calls[name])
        assert "run9-r1-a1-c0-s1" in details, name


def test_pulling_again_returns_the_same_order(opened: OpenRound) -> None:
    """A client that lost the answer, or was killed, is handed the order it has, unchanged."""
    peer, order = opened.peers[0], opened.orders[0]
    assert peer.pull().order == order
    peer.session_id = peer.register(num_examples=[10]).session_id
    assert peer.pull().order == order
    assert order.client_id == 0
    assert order.sections[0].size_bytes == len(peer.download(order.sections[0].digest))


def test_there_is_nothing_to_pull_once_the_order_is_delivered(opened: OpenRound) -> None:
    """Between its update and the next round a client waits, and learns for what."""
    assert opened.settle(0) == [pb.RECEIPT_STORED]
    work = opened.peers[0].pull(wait_s=0)
    assert work.state == pb.WORK_STATE_WAIT
    assert work.waiting == pb.Waiting(round=opened.orders[0].round)


def test_a_parked_pull_is_woken_when_the_round_opens(opened: OpenRound) -> None:
    """A long poll answers with the next round's order: were it not woken, it would say WAIT."""
    opened.settle(0)
    parked = opened.peers[0].stub.PullWork.future(
        pb.PullWorkRequest(session_id=opened.peers[0].session_id, wait=Duration(seconds=20))
    )
    opened.settle(1, 2)
    work = parked.result()
    assert work.state == pb.WORK_STATE_ORDER
    assert (work.order.round, work.order.attempt) == (opened.orders[0].round + 1, 1)
    assert work.order.last_counted_order_id == opened.orders[0].order_id
    open_round(opened.peers).settle()


def test_the_answer_to_register_has_the_partitioning(scene: Scene) -> None:
    """As the server's flags have it: shares are cut by it."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--partition", "dirichlet", "--alpha", 0.3),
        *("--num-partitions", 7, "--seed", 5),
    )
    connection = Connection(Route(server=server.address))
    answer = connection.register(
        Registration(client_ids=(0,), instance_key="key", software_version="1")
    )
    assert answer.partitioning.scheme == "dirichlet"
    assert (answer.partitioning.num_partitions, answer.partitioning.seed) == (7, 5)
    assert answer.partitioning.parameters == {"alpha": 0.3}
    connection.close()


def test_every_order_has_a_seed_of_its_own(opened: OpenRound) -> None:
    """Of each client, and in each round anew."""
    seeds = [order.seed for order in opened.orders.values()]
    opened.settle()
    following = open_round(opened.peers)
    seeds += [order.seed for order in following.orders.values()]
    following.settle()
    assert len(set(seeds)) == 6


def test_both_processes_with_copies_of_a_state_dir_are_refused(
    server: Server, opened: OpenRound, history: History
) -> None:
    """They took the session from each other; one that is started anew goes on at once."""

    def register(key: str) -> str:
        return peer.register(process_key=key).session_id

    peer = Peer(server.address, 64, num_examples=0)
    for key in ("original", "copy", "original", "copy"):
        session_id = register(key)
        if peer.session_id:
            expect_status(grpc.StatusCode.UNAUTHENTICATED, lambda: peer.pull(wait_s=0))
        peer.session_id = session_id
        assert peer.pull(wait_s=0).state == pb.WORK_STATE_WAIT
    for key in ("original", "copy"):
        sentence = expect_status(grpc.StatusCode.ALREADY_EXISTS, partial(register, key))
        assert "another process uses a copy of the state-dir of client id 64" in sentence
        expect_status(grpc.StatusCode.UNAUTHENTICATED, lambda: peer.pull(wait_s=0))
    incidents = entry_of(history(), opened.orders[0])["incidents"]
    kinds = [(incident["kind"], incident["client"]) for incident in incidents]
    assert kinds == [("state-dir-copied", 64)]
    peer.session_id = register("started anew")
    peer.leave(pb.LEAVE_REASON_STOPPED)
    peer.close()

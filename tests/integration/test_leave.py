"""Leave, and what the others learn: nobody waits for who isn't there, and nobody is called late."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fedclient.connection import Connection
from fedclient.goodbye import Goodbye
from fedclient.routes import choose_route
from fedclient.session import Patience, ServerSession
from fedrounds.errors import NoAnswer, OutOfSpace, ServerUnreachable, UnknownSession
from fedrounds.types import Leave, LeaveReason
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import (
    OpenRound,
    Peer,
    changed,
    entry_of,
    expect_status,
    open_round,
    payload_of,
)
from tests.processes import Scene, Server, fixed_port

LEASE_S = 3.0


@pytest.fixture(scope="module")
def pair_server(module_scene: Scene) -> Server:
    """Give a server whose rounds need the updates of both of its two clients."""
    started = module_scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--max-attempts", 1000),
        *("--min-clients", 2, "--stall-after", 3600, "--lease", 3600),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture
def pair(pair_server: Server) -> Iterator[OpenRound]:
    """Give a round of two clients, their orders just pulled."""
    peers = {client_id: Peer(pair_server.address, client_id) for client_id in (0, 1)}
    yield open_round(peers)
    for peer in peers.values():
        peer.close()


def open_next_attempt(failing: OpenRound) -> OpenRound:
    """Pull the orders of the attempt that follows; by then the previous attempt has failed."""
    order = failing.orders[0]
    return open_round(failing.peers, attempt=(order.round, order.attempt + 1))


def test_in_a_failed_attempt_the_good_client_isnt_called_late(
    pair: OpenRound, module_scene: Scene
) -> None:
    """Both answers name the attempt's failure, and the history holds nothing against the client."""
    good, order = pair.peers[0], pair.orders[0]
    payload = payload_of(changed(pair.base))
    pair.peers[1].report(pair.orders[1], gave_up=True)
    following = open_next_attempt(pair)
    report = pb.ReportProgressRequest(session_id=good.session_id, order_id=order.order_id)
    answer = good.stub.ReportProgress(report)
    assert answer.directive == pb.DIRECTIVE_ABANDON
    assert answer.order_end == pb.ORDER_END_ATTEMPT_FAILED
    for _ in range(2):
        receipt = good.upload(order, payload)
        assert receipt.receipt == pb.RECEIPT_LATE
        assert receipt.order_end == pb.ORDER_END_ATTEMPT_FAILED
    given_up = pair.peers[1].upload(pair.orders[1], payload)
    assert given_up.order_end == pb.ORDER_END_GIVEN_UP
    following.settle()
    incidents = entry_of(module_scene.history(), order)["incidents"]
    kinds = [(incident["kind"], incident["client"]) for incident in incidents]
    assert kinds == [("round-failed", None), ("update-late", 1)]


def test_an_update_that_was_stored_in_a_failed_attempt_isnt_called_late(pair: OpenRound) -> None:
    """Sent again after the attempt failed, it is answered with how its order ended."""
    assert pair.settle(0) == [pb.RECEIPT_STORED]
    pair.peers[1].report(pair.orders[1], gave_up=True)
    following = open_next_attempt(pair)
    again = pair.peers[0].upload(pair.orders[0], payload_of(pair.base))
    assert (again.receipt, again.order_end) == (pb.RECEIPT_LATE, pb.ORDER_END_ATTEMPT_FAILED)
    following.settle()


def departures(entry: dict[str, Any]) -> list[tuple[int, str]]:
    """Return which clients left in an attempt, each with its reason."""
    left = [incident for incident in entry["incidents"] if incident["kind"] == "client-left"]
    return [(incident["client"], incident["reason"]) for incident in left]


def states_of(entry: dict[str, Any]) -> dict[int, str]:
    """Return how the orders of an attempt stand, by client."""
    return {order["client"]: order["state"] for order in entry["orders"]}


def test_a_client_that_leaves_isnt_waited_for_or_asked_until_it_registers_again(
    pair: OpenRound, pair_server: Server, module_scene: Scene
) -> None:
    """The attempt fails at once, with the reason on record, and the next one waits for it."""
    staying, leaving = pair.peers[0], pair.peers[1]
    leaving.leave(pb.LEAVE_REASON_STOPPED)
    order = pair.orders[0]
    report = pb.ReportProgressRequest(session_id=staying.session_id, order_id=order.order_id)
    while (answer := staying.stub.ReportProgress(report)).directive == pb.DIRECTIVE_CONTINUE:
        continue
    assert answer.order_end == pb.ORDER_END_ATTEMPT_FAILED
    expect_status(grpc.StatusCode.UNAUTHENTICATED, lambda: leaving.pull(wait_s=0))
    entry = module_scene.history()[-1]
    assert (entry["phase"], states_of(entry)[1]) == ("FAILED", "ABANDONED")
    assert departures(entry) == [(1, "stopped")]
    assert "suspended_until" not in entry["incidents"][0]
    # It is the latest attempt: there is none after it while its client is away.
    assert entry_of(module_scene.history(), order) == entry
    pair_server.wait_for_line("waiting for clients: 1 of 2 are here")
    waiting = staying.pull(wait_s=0).waiting
    assert (waiting.round, waiting.clients_here, waiting.clients_needed) == (0, 1, 2)
    leaving.come_back()
    open_next_attempt(pair).settle()


def test_an_order_whose_update_its_client_keeps_waits_for_it(
    pair: OpenRound, module_scene: Scene
) -> None:
    """The client was stopped with its update in the outbox; started again it delivers it."""
    peer, order = pair.peers[1], pair.orders[1]
    assert pair.settle(0) == [pb.RECEIPT_STORED]
    peer.leave(pb.LEAVE_REASON_STOPPED, kept_order_ids=[order.order_id, "no-such-order"])
    assert states_of(entry_of(module_scene.history(), order)) == {0: "STORED", 1: "OPEN"}
    expect_status(grpc.StatusCode.UNAUTHENTICATED, lambda: peer.pull(wait_s=0))
    peer.come_back()
    assert peer.upload(order, payload_of(pair.base)).receipt == pb.RECEIPT_STORED
    open_round(pair.peers).settle()
    entry = entry_of(module_scene.history(), order)
    assert states_of(entry) == {0: "COUNTED", 1: "COUNTED"}
    assert departures(entry) == [(1, "stopped")]


def test_a_client_that_is_coming_back_goes_on_with_its_order(pair: OpenRound) -> None:
    """Started again within its lease it is given the order that it had."""
    peer, order = pair.peers[1], pair.orders[1]
    peer.leave(pb.LEAVE_REASON_STOPPED, coming_back=True)
    peer.come_back()
    assert peer.pull_order() == order
    assert pair.settle() == [pb.RECEIPT_STORED] * 2


def test_another_process_may_take_the_id_of_a_client_that_left(pair: OpenRound) -> None:
    """It needn't wait for a lease, whether or not the client is coming back."""
    for coming_back in (False, True):
        pair.peers[1].leave(pb.LEAVE_REASON_STOPPED, coming_back=coming_back)
        pair.peers[1].instance_key += "-successor"
        pair.peers[1].come_back()
    open_next_attempt(pair).settle()
    # So that the next test's client can have the id.
    pair.peers[1].leave(pb.LEAVE_REASON_STOPPED)


def test_a_client_must_say_why_it_leaves(pair: OpenRound) -> None:
    """A goodbye without a reason changes nothing."""
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: pair.peers[1].leave(pb.LEAVE_REASON_UNSPECIFIED),
        match="there is no reason",
    )
    assert pair.settle() == [pb.RECEIPT_STORED] * 2


def test_whoever_does_not_come_back_within_a_lease_is_done_without(scene: Scene) -> None:
    """A client of many in one process leaves alone; a promise to return is good for one lease."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--min-clients", 3, "--min-updates", 1),
        *("--stall-after", 3600, "--lease", LEASE_S),
    )
    many, absent = Peer(server.address, 5, num_examples=0), Peer(server.address, 7)
    many.session_id = many.register(client_ids=[5, 6], num_examples=[10, 10]).session_id
    order = many.pull_order()
    assert order.client_id == 5
    absent.pull_order()
    absent.leave(pb.LEAVE_REASON_STOPPED, coming_back=True)
    many.leave(pb.LEAVE_REASON_TASK_FAILED, client_ids=[6])
    # The session goes on, and its other client delivers.
    assert many.upload(order, payload_of(many.base_of(order))).receipt == pb.RECEIPT_STORED
    server.wait_for_line("round-done round=1")
    (entry, *_) = scene.history()
    assert states_of(entry) == {5: "COUNTED", 6: "ABANDONED", 7: "ABANDONED"}
    assert departures(entry) == [(7, "stopped"), (6, "task-failed"), (7, "did not come back")]
    assert [entry["phase"] for entry in scene.history()] == ["DONE"]
    absent.come_back()
    many.session_id = many.register(client_ids=[5, 6], num_examples=[10, 10]).session_id
    # None of them is suspended.
    assert {many.pull_order().round, absent.pull_order().round} == {2}
    for peer in (many, absent):
        peer.close()


def test_with_require_all_a_stopped_client_is_waited_for_and_a_failed_client_isnt(
    scene: Scene,
) -> None:
    """Time decides nothing there: a stop and a start give the run that nobody disturbed."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--min-clients", 2, "--require-all", "--rounds", 9)
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in (0, 1)}
    opened = open_round(peers)
    peers[1].leave(pb.LEAVE_REASON_STOPPED)
    assert states_of(scene.history()[-1]) == {0: "OPEN", 1: "OPEN"}
    peers[1].come_back()
    assert opened.settle() == [pb.RECEIPT_STORED] * 2
    following = open_round(peers)
    peers[1].leave(pb.LEAVE_REASON_TASK_FAILED)
    # It can't take part: the attempt fails for want of its update.
    server.wait_for_line("round-failed round=2")
    assert states_of(entry_of(scene.history(), following.orders[1])) == {
        0: "ABANDONED",
        1: "ABANDONED",
    }
    for peer in peers.values():
        peer.close()


def test_in_an_asynchronous_round_a_client_that_is_back_is_given_another_order(
    scene: Scene,
) -> None:
    """It goes on at once, in the same round: leaving isn't giving up."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--min-clients", 1, "--strategy", "fedbuff"),
        *("--strategy-parameters", "buffer_size=1"),
    )
    peer = Peer(server.address, 0)
    first = peer.pull_order()
    peer.leave(pb.LEAVE_REASON_STOPPED)
    peer.come_back()
    second = peer.pull_order()
    assert (second.round, second.attempt) == (first.round, first.attempt)
    assert second.order_id != first.order_id
    assert peer.upload(second, payload_of(peer.base_of(second))).receipt == pb.RECEIPT_STORED
    server.wait_for_line("round-done round=1")
    assert departures(scene.history()[0]) == [(0, "stopped")]
    peer.close()


def test_a_process_whose_main_thread_is_busy_says_goodbye_all_the_same(
    pair_server: Server, pair: OpenRound
) -> None:
    """Once, from whichever thread comes first; a server that is gone is let be."""
    route = choose_route(pair_server.address, proxy=None, environment={})
    connection = Connection(route)
    session = ServerSession(
        connection,
        patience=Patience(server=pair_server.address, stop=threading.Event()),
        client_ids=(50,),
        instance_key="fifty",
        task="",
        load_data=lambda _: (10,),
    )
    goodbye = Goodbye(session, route=route, kept_order_ids=list, coming_back=False)
    goodbye.say(LeaveReason.STOPPED)
    assert pair_server.count_lines("client=50") == 0, "there is no session to leave"
    session.open()
    goodbye.say_stopped_soon()
    goodbye.say(LeaveReason.GAVE_UP)
    pair_server.wait_for_line("client-left .*client=50 reason=stopped")
    with pytest.raises(UnknownSession):
        connection.leave(session.info.session_id, Leave(reason=LeaveReason.GAVE_UP))
    connection.close()
    gone = choose_route(f"127.0.0.1:{fixed_port()}", proxy=None, environment={})
    Goodbye(session, route=gone, kept_order_ids=list, coming_back=False).say(LeaveReason.STOPPED)
    assert pair.settle() == [pb.RECEIPT_STORED] * 2


def test_a_client_gives_up_a_server_that_never_answers() -> None:
    """Not a server that answers that its disk is full; the time begins anew with each answer."""
    answers = iter([OutOfSpace("full")] + [ServerUnreachable("gone")] * 1000)

    def attempt() -> None:
        raise next(answers)

    patience = Patience(server="there:1", stop=threading.Event(), give_up_after_s=0.01)
    with pytest.raises(NoAnswer, match=r"there:1 hasn't answered for 0.01 s .*: gone"):
        patience.insist(attempt)
    assert len(list(answers)) < 1000

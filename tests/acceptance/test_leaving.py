"""Client processes that end before the run does: nobody waits for them, and the others go on."""

import signal

from tests.acceptance.federation import (
    NO_CLOCK,
    expect_clean_exits,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Scene, fixed_port


def test_a_stopped_client_is_done_without_and_goes_on_when_it_is_back(scene: Scene) -> None:
    """Its round closes at once; the next one waits for it, and it isn't suspended."""
    server = start_server(
        scene, *("--rounds", 2, "--min-clients", 2, "--min-updates", 1), *NO_CLOCK
    )
    other = start_client(scene, 0, server.address)
    slow = start_client(scene, 1, server.address, TINY_STEP_S="600")
    other.wait_for_line("update stored")
    server.wait_for_line("round-opened round=1")
    slow.wait_for_line("client 1 has")
    # Whether it trains by now, or is about to: its order is open.
    slow.signal(signal.SIGTERM)
    expect_clean_exits(slow)
    server.wait_for_line("client-left .*client=1 reason=stopped")
    server.wait_for_line("round-done round=1")
    again = start_client(scene, 1, server.address)
    expect_clean_exits(server, other, again)
    assert verdicts(scene.history()) == [
        (1, 0, "COUNTED"),
        (1, 1, "ABANDONED"),
        (2, 0, "COUNTED"),
        (2, 1, "COUNTED"),
    ]


def test_of_many_ids_an_id_without_data_and_one_with_broken_data_leave_the_others_at_work(
    scene: Scene,
) -> None:
    """The one takes no part, the other leaves with its error in the log; the run is done."""
    server = start_server(
        scene, *("--rounds", 2, "--min-clients", 2, "--min-updates", 1), *NO_CLOCK
    )
    many = start_client(scene, "0-3", server.address, TINY_EMPTY="1", TINY_BROKEN="2")
    assert (many.wait(), server.wait()) == (1, 0)
    assert many.count_lines("client 1: no examples, takes no part; the others do") == 1
    assert many.count_lines("client 2 leaves the run, since the task's own code failed") == 1
    assert many.count_lines("^OSError: .*can't be read") == 1
    assert many.count_lines("^fedclient: 1 of 4 clients left the run") == 1
    history = scene.history()
    assert verdicts(history) == [
        (1, 0, "COUNTED"),
        (1, 2, "ABANDONED"),
        (1, 3, "COUNTED"),
        (2, 0, "COUNTED"),
        (2, 3, "COUNTED"),
    ]
    kinds = [(incident["kind"], incident["client"]) for incident in history[0]["incidents"]]
    assert kinds == [("training-failed", 2), ("client-left", 2)]
    assert history[0]["incidents"][1]["reason"] == "task-failed"


def test_a_client_that_nobody_answers_ends_with_a_code_of_its_own(scene: Scene) -> None:
    """A scheduler's job comes to its end though the run is over or the server is gone."""
    client = start_client(scene, 0, f"127.0.0.1:{fixed_port()}", "--give-up-after", 1)
    assert client.wait() == 3
    assert client.count_lines("^fedclient: .*hasn't answered for 1 s .--give-up-after.") == 1

"""What a client's person is shown of its work."""

import logging
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from fedclient import terminal
from fedclient.progress import ProgressReporter
from fedclient.terminal import Screen, describe_progress, duration, showing
from fedrounds.types import WorkOrder
from tests.factories import make_order

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"


@pytest.fixture
def progress() -> ProgressReporter:
    """Give a reporter that nobody listens to."""
    return ProgressReporter(lambda _, __: None, stop=threading.Event())


def order_of(round_number: int) -> WorkOrder:
    """Return an order of client 0."""
    return replace(make_order(), round_number=round_number)


def shown(screen: Screen) -> str:
    """Return what a terminal of 100 columns shows."""
    console = Console(width=100, height=24)
    with console.capture() as captured:
        console.print(screen.render())
    return captured.get().rstrip()


def test_between_orders_the_screen_says_what_it_waits_for(progress: ProgressReporter) -> None:
    screen = Screen()
    screen.wait_for("loading the data")
    assert shown(screen).endswith("loading the data")
    with screen.working_on(order_of(3), progress):
        assert "client 0, round 3" in shown(screen)
    assert shown(screen).endswith("waiting for the next order; the last was of round 3")


def test_an_order_is_shown_with_step_loss_and_time_left(progress: ProgressReporter) -> None:
    """Eight steps and four batches of an evaluation are half of 24 in the bar, not of the steps."""
    screen = Screen()
    screen.expect_rounds(5)
    with screen.working_on(order_of(2), progress):
        assert shown(screen).endswith("getting ready")
        progress.add(bytes_received=2_500_000)
        assert shown(screen).endswith("getting the global model, 2.5 MB")
        progress.expect_batches(steps=20, evaluation_batches=4)
        progress.add(evaluation_batches=2)
        assert shown(screen).endswith("evaluating, batch 2 of 4, 0:00 left")
        progress.add(evaluation_batches=2)
        progress.add(steps=8, loss=0.125)
        line = shown(screen)
        assert line.startswith("client 0, round 2 of 5 ")
        assert line.endswith("step 8 of 20, loss 0.125, 0:00 left")
        assert line.count(BAR) == 15
        progress.add(bytes_sent=1_000_000)
        assert shown(screen).endswith("sending the update, 1.0 MB")


def test_many_clients_in_one_process_share_one_line(progress: ProgressReporter) -> None:
    """It says how many updates of the round have gone already; the next round counts anew."""
    screen = Screen()
    for _ in range(3):
        screen.count_sent(1)
    with screen.working_on(order_of(1), progress):
        assert "client 0, round 1, 3 sent" in shown(screen)
    screen.count_sent(2)
    with screen.working_on(order_of(2), progress):
        assert "client 0, round 2, 1 sent" in shown(screen)


def test_the_time_left_goes_by_the_pace_so_far(progress: ProgressReporter) -> None:
    progress.expect_batches(steps=4)
    assert progress.remaining_s() is None
    began = time.monotonic()
    progress.add(steps=1)
    least_s = progress.remaining_s()
    assert least_s is not None
    assert 0 <= least_s <= 3 * (time.monotonic() - began) + 3
    progress.add(steps=3)
    assert progress.remaining_s() == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (3750, "1:02:30")]
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_outside_of_a_terminal_a_long_order_gets_a_line(
    progress: ProgressReporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it ends: whoever reads a log sees that it goes on."""
    monkeypatch.setattr(terminal, "_FIRST_LINE_AFTER_S", 0.0)
    shown = threading.Event()

    def hear(_: logging.LogRecord) -> bool:
        shown.set()
        return True

    caplog.handler.addFilter(hear)
    progress.expect_batches(steps=8)
    progress.add(steps=2)
    screen = Screen()
    with (
        caplog.at_level(logging.INFO, logger="fedclient"),
        showing(screen),
        screen.working_on(order_of(4), progress),
    ):
        assert shown.wait(60)
    assert "client 0, round 4: step 2 of 8" in caplog.messages[0]


def test_unknown_fields_are_left_out(progress: ProgressReporter) -> None:
    progress.add(steps=1)
    assert describe_progress(progress) == "step 1 of 0"


def test_no_answer_takes_the_place_of_what_the_client_would_do(progress: ProgressReporter) -> None:
    """While it waits and while it works on an order, until the server answers again."""
    screen = Screen()
    trouble = "no answer from there:1; trying again"
    screen.wait_for("waiting for the first order")
    screen.show_trouble(trouble)
    assert shown(screen).endswith(trouble)
    with screen.working_on(order_of(3), progress):
        assert shown(screen).endswith(trouble)
        assert screen.line() == f"client 0, round 3: {trouble}"
        screen.show_trouble("")
        assert shown(screen).endswith("getting ready")


def test_a_silent_server_is_named_beside_the_progress(
    progress: ProgressReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers to the reports are what shows that it is there."""
    assert describe_progress(progress) == "getting ready"
    monkeypatch.setattr(terminal, "_SILENCE_S", 0.0)
    text = describe_progress(progress)
    assert text == "getting ready; no answer from the server for 0:00"

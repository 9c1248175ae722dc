"""The thread that reports to the server how far an order is."""

import threading
from collections.abc import Sequence

import pytest

from fedclient.progress import ProgressReporter
from fedrounds.types import MAX_INCIDENTS, Counters, Incident, IncidentKind


def test_a_report_under_way_ends_before_the_order_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of an order is left over: a thread that returns as the process ends would crash."""
    has_begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def report(_: Counters, __: Sequence[tuple[int, Incident]]) -> None:
        has_begun.set()
        may_end.wait()
        ended.append("report")

    reporter = ProgressReporter(report, stop=threading.Event())
    join = reporter._thread.join

    def wait_for_the_report() -> None:
        may_end.set()
        join()

    monkeypatch.setattr(reporter._thread, "join", wait_for_the_report)
    with reporter:
        has_begun.wait()
    ended.append("order")
    wait_for_the_report()
    assert ended == ["report", "order"]


def test_of_very_many_incidents_the_first_and_the_newest_are_reported() -> None:
    """The server takes so many of an order, and none at all of a report with more."""
    reporter = ProgressReporter(lambda _, __: None, stop=threading.Event())
    for number in range(MAX_INCIDENTS + 100):
        reporter.note(Incident(kind=IncidentKind.TRAINING_DIAGNOSED, step=number))
    unreported = reporter.unreported
    assert [number for number, _ in unreported] == list(range(1, MAX_INCIDENTS + 1))
    assert [incident.step for _, incident in unreported[:2]] == [0, 1]
    assert unreported[-1][1].step == MAX_INCIDENTS + 99

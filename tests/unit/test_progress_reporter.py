"""The thread that tells the server how far an order is."""

import threading
from collections.abc import Sequence

from fedclient.progress import ProgressReporter
from shared.types import Counters, Directive, Incident


def test_a_report_under_way_ends_before_the_order_does() -> None:
    """No thread of an order is left over: one that comes back as the process ends would crash."""
    has_begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def report(_: Counters, __: Sequence[tuple[int, Incident]]) -> Directive:
        has_begun.set()
        may_end.wait()
        ended.append("report")
        return Directive.CONTINUE

    def work() -> None:
        with ProgressReporter(report, stop=threading.Event()):
            has_begun.wait()
        ended.append("order")

    working = threading.Thread(target=work)
    working.start()
    has_begun.wait()
    working.join(0.2)
    may_end.set()
    working.join()
    assert ended == ["report", "order"]

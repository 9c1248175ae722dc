"""Fail points, where a test can kill or halt this process; off unless the environment arms a point.

`FED_FAIL_POINT=round-closed:kill:2` ends the process, as kill -9 does, the second time it reaches
that fail point; `halt` stops it (SIGSTOP) until a SIGCONT.
"""

import os
import signal
from enum import StrEnum

VARIABLE = "FED_FAIL_POINT"


class FailPoint(StrEnum):
    """Between which two lines of the data's path something may happen."""

    UPGRADE_MADE = "upgrade-made"
    """The server has upgraded its database in a transaction that isn't committed yet."""
    ROUND_OPENED = "round-opened"
    """The server has recorded a round and not handed out an order."""
    UPDATE_DURABLE = "update-durable"
    """The server has an update on the disk and not in the store."""
    UPDATE_RECORDED = "update-recorded"
    """The server has recorded an update, good, bad or late, and not given the receipt."""
    ORDER_ABANDONED = "order-abandoned"
    """The server has recorded that an order is given up, and its client doesn't know yet."""
    ROUND_CLOSING = "round-closing"
    """The server has all updates and hasn't recorded that the round is closed."""
    ROUND_CLOSED = "round-closed"
    """The server has recorded that the round is closed and not begun to aggregate."""
    ROUND_FAILED = "round-failed"
    """The server has recorded that an attempt failed and not opened the next attempt."""
    MODEL_WRITTEN = "model-written"
    """The server has the next model on the disk and not in the store."""
    ROUND_DONE = "round-done"
    """The server has recorded that the round is done and not handed out the next round."""
    EVALUATED = "evaluated"
    """The server has evaluated a model and not recorded it."""
    ALARM_RECORDED = "alarm-recorded"
    """The server has recorded that a model is bad and not rolled it back."""
    ROLLED_BACK = "rolled-back"
    """The server has recorded that a model is rolled back and not opened its round again."""
    RUN_EXPORTED = "run-exported"
    """The server has exported the last model and not recorded that the run is over."""
    ORDER_PULLED = "order-pulled"
    """The client has an order and not the model."""
    MODEL_FETCHED = "model-fetched"
    """The client has the model and hasn't trained."""
    TRAINED = "trained"
    """The client has trained and not put the update into its outbox."""
    UPDATE_KEPT = "update-kept"
    """The client has the update in its outbox and not sent it."""
    RECEIPT_GIVEN = "receipt-given"
    """The client has the receipt and not forgotten the update."""


_SIGNALS = {"kill": signal.SIGKILL, "halt": signal.SIGSTOP}
_armed_point, _, _rest = os.environ.get(VARIABLE, "").partition(":")
_action, _, _times = _rest.partition(":")
_passes_left = int(_times or "1")


def failpoint(point: FailPoint) -> None:
    """Kill or halt the process if the environment arms this fail point."""
    global _passes_left  # noqa: PLW0603
    if point == _armed_point:
        _passes_left -= 1
        if _passes_left == 0:
            os.kill(os.getpid(), _SIGNALS[_action])

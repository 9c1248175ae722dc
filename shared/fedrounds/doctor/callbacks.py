"""Callbacks whose errors are their caller's to see, and no fault of the doctor's."""

from collections.abc import Callable


class CallerError(Exception):
    """A callback raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def passing(callback: Callable[..., None]) -> Callable[..., None]:
    """Return a callback whose errors pass through the doctor to its caller."""

    def call(*values: object) -> None:
        try:
            callback(*values)
        except Exception as error:
            raise CallerError(error) from error

    return call

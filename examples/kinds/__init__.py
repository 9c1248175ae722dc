"""Kinds of training beside the classification of one tensor, each as a task of a few lines."""

from fedrounds import DataRequest


def seed_of(request: DataRequest) -> int:
    """Return the seed of a client's draw of examples in a simulation; 0 is the server's."""
    assert request.partition is not None
    return 1 + request.partition.index

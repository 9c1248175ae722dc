"""Values that follow from a run's settings: the compression of updates, the seed of a strategy.

The settings of a run that goes on are ServerSettings (see `ServerSettings.going_on_with`); those
that the store and the ledger hold as JSON are read by `recorded_settings`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedrounds.seeds import derive_seed
from fedrounds.types import NO_COMPRESSION, Compression, Encoding
from fedserver.settings import ServerSettings, settings_begun_with


def recorded_settings(recorded: Mapping[str, Any]) -> ServerSettings:
    """Return the settings of a run from those that were `recorded` when it began.

    Settings that came later have the value that means what the run did before there were any;
    settings that don't identify a run have their defaults.
    """
    # Not read from flags, files and the environment: those are this process's.
    return ServerSettings.model_construct(**settings_begun_with(recorded))


def compression_of(settings: ServerSettings, encoding: Encoding | str) -> Compression:
    """Return the compression of an update with this encoding, in a run with these settings."""
    return replace(run_compression(settings), encoding=Encoding(encoding))


def run_compression(settings: ServerSettings) -> Compression:
    """Return the compression that a run asks its clients for."""
    if settings.compression == "none":
        return NO_COMPRESSION
    return Compression(
        encoding=Encoding(settings.compression),
        block_size=settings.compression_block,
        fraction=settings.compression_fraction,
    )


def strategy_seed(settings: ServerSettings, round_number: int, attempt: int) -> int:
    """Return the seed of a strategy's random draws in an attempt at a round."""
    return derive_seed(settings.seed, "strategy", round_number=round_number, attempt=attempt)

"""What follows from a run's settings: how updates are compressed, which seeds are drawn from.

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
    """Return the settings of a run, of which `recorded` was written down when it began.

    Settings that came later have the value that means what the run did before there were any;
    settings that don't identify a run have their defaults.
    """
    # Not read from flags, files and the environment: those are this process's.
    return ServerSettings.model_construct(**settings_begun_with(recorded))


def compression_of(settings: ServerSettings, encoding: Encoding | str) -> Compression:
    """Return how an update of a run with these settings was compressed that has this encoding."""
    return replace(run_compression(settings), encoding=Encoding(encoding))


def run_compression(settings: ServerSettings) -> Compression:
    """Return how a run asks its clients to compress updates."""
    if settings.compression == "none":
        return NO_COMPRESSION
    return Compression(
        encoding=Encoding(settings.compression),
        block_size=settings.compression_block,
        fraction=settings.compression_fraction,
    )


def strategy_seed(settings: ServerSettings, round_number: int, attempt: int) -> int:
    """Return the seed of what a strategy draws in an attempt at a round."""
    return derive_seed(settings.seed, "strategy", round_number=round_number, attempt=attempt)

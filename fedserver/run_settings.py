"""Which settings are recorded with a run; compression and seeds that follow from them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedrounds.seeds import derive_seed
from fedrounds.types import NO_COMPRESSION, Compression, Encoding

RUN_SETTINGS = (
    "task",
    "partition",
    "num_partitions",
    "alpha",
    "shards_per_client",
    "classes_per_client",
    "seed",
    "init",
    "rounds",
    "strategy",
    "strategy_parameters",
    "min_clients",
    "clients_per_round",
    "cohort",
    "cohort_candidates",
    "concurrency",
    "max_staleness",
    "over_select",
    "min_updates",
    "norm_band",
    "require_all",
    "evaluate_on_clients",
    "holdout",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "clip_norm",
    "schedule",
    "schedule_over",
    "warmup_epochs",
    "decay_epochs",
    "decay",
    "augment",
    "work_deadline",
    "stragglers",
    "straggler_work",
    "compression",
    "compression_block",
    "compression_fraction",
    "max_num_examples",
    "max_delta_norm",
    "max_adjustments",
    "max_rollbacks",
)
"""What makes a run this run: with other values of these it would be another one."""

CHANGEABLE_SETTINGS = ("keep_rounds",)
"""Recorded too, but a later start may give another value; not given, the recorded one holds."""

BEFORE_THEY_WERE_RECORDED: Mapping[str, Any] = {"keep_rounds": "all"}
"""What a run of earlier software does, where that isn't what the setting's default says today."""


def compression_of(settings: Mapping[str, Any], encoding: Encoding | str) -> Compression:
    """Return how an update of a run with these settings was compressed that has this encoding."""
    return replace(run_compression(settings), encoding=Encoding(encoding))


def run_compression(settings: Mapping[str, Any]) -> Compression:
    """Return how a run asks its clients to compress updates."""
    name = settings.get("compression", "none")
    if name == "none":
        return NO_COMPRESSION
    return Compression(
        encoding=Encoding(name),
        block_size=settings["compression_block"],
        fraction=settings["compression_fraction"],
    )


def strategy_seed(settings: Mapping[str, Any], round_number: int, attempt: int) -> int:
    """Return the seed of what a strategy draws in an attempt at a round."""
    return derive_seed(
        settings.get("seed", 0), "strategy", round_number=round_number, attempt=attempt
    )

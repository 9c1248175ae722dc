"""Which settings are recorded with a run, and what they mean in runs of earlier software."""

from collections.abc import Mapping
from typing import Any

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

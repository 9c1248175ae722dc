"""The coordinator's settings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import Settings
from fedrounds.types import (
    MAX_WEIGHT,
    AugmentationName,
    InitialisationName,
    OptimizerName,
    Partitioning,
    Schedule,
    ScheduleName,
    TrainingConfig,
)
from fedserver.preflight import validate_together

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

_TRAINING = TrainingConfig()
_SCHEDULE = Schedule()

CohortName = Literal["uniform", "data-size", "round-robin", "power-of-choice", "availability"]
Kept = Annotated[int, Field(ge=0)] | Literal["all"]


class ListeningSettings(Settings):
    """Where it listens and keeps things."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(default=50051, ge=0, le=65535, description="0: any free port")
    state_dir: Path = Field(default=Path("state/server"), description="everything durable is here")
    export: Path | None = Field(
        default=None, description="where the final model goes; model.safetensors in the state-dir"
    )
    summary: bool = Field(
        default=True,
        description="print the table of rounds at the end, and draw curve.png in the state-dir",
    )
    keep_updates: Kept = Field(
        default=0, description="of how many finished rounds the updates are kept, or all"
    )
    keep_rounds: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default=10,
        description="of how many finished rounds the models are kept, or all; the best too",
    )
    quarantine_bytes: int = Field(
        default=1_000_000_000, ge=0, description="bytes of refused updates that are kept"
    )
    min_free_bytes: int = Field(
        default=200_000_000, ge=0, description="bytes free on the disk without which no round opens"
    )
    give_up_damaged: bool = Field(
        default=False,
        description="start though updates on the disk are damaged; asks for them anew",
    )
    threads: int = Field(default=1, ge=1, description="threads of tensor work")

    @field_validator("host")
    @classmethod
    def _validate_host(cls, host: str) -> str:
        """Refuse what can be no host; an IPv6 address may stand in brackets."""
        host = host.removeprefix("[").removesuffix("]")
        if not re.fullmatch(r"[^][/\s]+", host):
            raise ValueError("write a host's name or address, such as 0.0.0.0 or [::1]")
        if host.rpartition(":")[2].isdecimal() and host.count(":") == 1:
            raise ValueError("give the port by itself, with --port")
        return host


class LearningSettings(Settings):
    """What is learned."""

    task: str = Field(default="mnist-sample", description="a task's name, or package.module:task")
    data_root: Path | None = Field(default=None, description="folder of the data sets")
    partition: str = Field(
        default="iid",
        description="how a simulation deals data out: iid, shards, classes, dirichlet, "
        "class-dirichlet, quantity",
    )
    num_partitions: int = Field(default=10, ge=1, description="into how many parts")
    alpha: float | None = Field(
        default=None, gt=0, description="of dirichlet, class-dirichlet, quantity"
    )
    shards_per_client: int | None = Field(default=None, ge=1, description="of partition shards")
    classes_per_client: int | None = Field(default=None, ge=1, description="of partition classes")
    seed: int = Field(default=0, ge=0, description="every random stream derives from it")
    init: InitialisationName = Field(
        default="default", description="how the first global model's weights are drawn (torch.nn)"
    )


class RoundSettings(Settings):
    """Rounds."""

    rounds: int = Field(default=10, ge=1, description="rounds in the run")
    strategy: str = Field(
        default="fedavg",
        description="how updates become the next model, such as krum or nnm+median+fedadam; the "
        "command strategies lists all",
    )
    strategy_parameters: dict[str, float] = Field(
        default_factory=dict,
        description="numbers of the strategy by name: f=2,server_lr=0.03; a table in TOML",
    )
    min_clients: int = Field(default=2, ge=1, description="clients that must be there to begin")
    clients_per_round: int = Field(default=0, ge=0, description="size of a cohort; 0: everybody")
    cohort: CohortName = Field(
        default="uniform",
        description="whom a round asks, of those there are: any (uniform), by the size of their "
        "data, whoever was asked least (round-robin), where the model is worst (power-of-choice), "
        "who is likely to answer",
    )
    cohort_candidates: int = Field(
        default=0,
        ge=0,
        description="how many power-of-choice draws to choose from; 0: twice as many as it asks",
    )
    concurrency: int = Field(
        default=0,
        ge=0,
        description="clients that an asynchronous strategy keeps at work; 0: everybody",
    )
    max_staleness: int | None = Field(
        default=None,
        ge=0,
        description="rounds after which an asynchronous run waits for an order's update no more",
    )
    over_select: float = Field(
        default=1, ge=1, description="ask this many times --clients-per-round; the slowest are late"
    )
    min_updates: int = Field(
        default=0,
        ge=0,
        description="updates a round needs; 0: as many as --min-clients or --clients-per-round, "
        "whichever is less, or with --over-select as --clients-per-round",
    )
    evaluate_on_clients: bool = Field(
        default=False, description="clients also say how good the global model is on their data"
    )
    holdout: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="share of its examples that a client never trains on and says so of; 0: it is "
        "asked about those it trains on",
    )
    max_attempts: int = Field(default=5, ge=1, description="tries at one round before giving up")
    max_adjustments: int = Field(
        default=3,
        ge=0,
        description="steps by which rate and clipping may be changed when several clients report "
        "the same cause; 0: never",
    )
    max_rollbacks: int = Field(
        default=2,
        ge=0,
        description="times that a round is repeated because its model is bad; 0: never",
    )
    require_all: bool = Field(
        default=False, description="wait for every client of the cohort, however long it takes"
    )
    stall_after: float = Field(
        default=60,
        gt=0,
        description="seconds until an order is given up whose client isn't heard of, or makes no "
        "progress for ten times its longest step so far",
    )
    first_step: float = Field(
        default=600,
        gt=0,
        description="seconds that a client may take for its first step of training, as long as it "
        "is heard of, or to pull its order",
    )
    min_examples_per_s: float = Field(
        default=0.1,
        gt=0,
        description="slowest training that an order is waited for, in examples a second",
    )
    min_bytes_per_s: float = Field(
        default=10_000,
        gt=0,
        description="slowest transfer that an order is waited for, in bytes a second",
    )
    round_deadline: float | None = Field(
        default=None, gt=0, description="seconds after which a round closes with what it has"
    )
    lease: float = Field(
        default=30, gt=0, description="seconds without a call until a client counts as gone"
    )
    farewell: float = Field(
        default=10, ge=0, description="seconds to wait at the end for clients to hear of it"
    )


class TrainingSettings(Settings):
    """How clients train."""

    epochs: int = Field(default=_TRAINING.epochs, ge=1, description="local epochs a round")
    batch_size: int = Field(default=_TRAINING.batch_size, ge=1, description="examples a step")
    optimizer: OptimizerName = Field(default="sgd", description="local optimizer")
    lr: float = Field(default=_TRAINING.lr, gt=0, description="local learning rate")
    momentum: float = Field(default=_TRAINING.momentum, ge=0, lt=1, description="local momentum")
    weight_decay: float = Field(default=_TRAINING.weight_decay, ge=0, description="L2 penalty")
    clip_norm: float | None = Field(
        default=_TRAINING.clip_norm, gt=0, description="largest L2 norm of a gradient"
    )
    schedule: ScheduleName = Field(
        default="constant", description="how the learning rate falls; cosine: to 0"
    )
    schedule_over: Literal["run", "round"] = Field(
        default="run", description="once over the run's epochs, or anew in every round"
    )
    warmup_epochs: float = Field(
        default=_SCHEDULE.warmup_epochs, ge=0, description="over which the learning rate grows"
    )
    decay_epochs: int = Field(
        default=_SCHEDULE.decay_epochs, ge=1, description="epochs a step of schedule step"
    )
    decay: float = Field(
        default=_SCHEDULE.decay, gt=0, le=1, description="factor at each step of schedule step"
    )
    augment: AugmentationName = Field(
        default="none", description="change inputs at random; shift: images, by up to 2 pixels"
    )
    work_deadline: float | None = Field(
        default=None,
        gt=0,
        description="seconds after which a client ends training and sends what it has done",
    )
    stragglers: float = Field(
        default=0,
        ge=0,
        le=1,
        description="for experiments: this share of a round's clients, drawn anew in each, does "
        "only 1 to --epochs epochs, drawn too",
    )
    straggler_work: Literal["partial", "none"] = Field(
        default="partial",
        description="none: stragglers aren't asked, as where their work comes too late",
    )


class CompressionSettings(Settings):
    """How clients send what they have learned."""

    compression: Literal["none", "float16", "bfloat16", "int8", "top-k"] = Field(
        default="none",
        description="how clients compress their updates: by half (float16, bfloat16), to a quarter "
        "(int8), to the largest changes alone (top-k)",
    )
    compression_block: int = Field(
        default=256, ge=8, le=65536, description="values that share a scale, of int8"
    )
    compression_fraction: float = Field(
        default=0.05, gt=0, le=0.5, description="share of the changes that top-k sends"
    )


class AdmissionSettings(Settings):
    """What is admitted."""

    max_num_examples: int = Field(
        default=10_000_000, ge=1, lt=MAX_WEIGHT + 1, description="largest weight of an update"
    )
    max_delta_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest L2 norm of local minus global; 100 * (1 + norm of the global model)",
    )
    norm_band: float = Field(
        default=10,
        ge=0,
        description="an update is excluded if its L2 norm of local minus global is so many times "
        "what other clients' updates allow for its work (more with few clients, and never with "
        "fewer than four); 0: none is",
    )
    max_uploads: int = Field(default=16, ge=1, description="uploads written at the same time")


class ServerSettings(
    AdmissionSettings,
    CompressionSettings,
    TrainingSettings,
    RoundSettings,
    LearningSettings,
    ListeningSettings,
):
    """Run a federated-learning coordinator; it exits with 0 when the run is done.

    Also: `history`, `show`, `curve`, `confusion`, `clients`, `export` and `verify` look at a run,
    also while it goes on (`history --help`); `quarantine` decides about refused updates;
    `strategies` lists what --strategy can name.
    Started again with the same settings, an unfinished run goes on where it was.
    """

    model_config = SettingsConfigDict(env_prefix="FEDSERVER_", cli_prog_name="python -m fedserver")

    @model_validator(mode="after")
    def _validate_together(self) -> Self:
        """Refuse settings that contradict each other.

        As a validator: the process ends with exit code 2 before torch is imported, as it does for
        a single wrong flag.
        """
        validate_together(self)
        return self

    @property
    def schedule_epochs(self) -> int:
        """The epochs that a learning rate's schedule goes over."""
        return self.epochs * (self.rounds if self.schedule_over == "run" else 1)

    def training_in(self, round_number: int) -> TrainingConfig:
        """What is sent to clients with every order of a round, from 1."""
        is_over_run = self.schedule_over == "run"
        return TrainingConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            schedule=Schedule(
                name=self.schedule,
                warmup_epochs=self.warmup_epochs,
                decay_epochs=self.decay_epochs,
                decay=self.decay,
                first_epoch=(round_number - 1) * self.epochs if is_over_run else 0,
                total_epochs=self.schedule_epochs,
            ),
            augmentation=self.augment,
            work_deadline_s=self.work_deadline,
        )

    @property
    def partitioning(self) -> Partitioning:
        """How the clients of a simulation deal the data out."""
        given = {
            "alpha": self.alpha,
            "shards_per_client": self.shards_per_client,
            "classes_per_client": self.classes_per_client,
        }
        return Partitioning(
            scheme=self.partition,
            num_partitions=self.num_partitions,
            seed=self.seed,
            parameters={name: value for name, value in given.items() if value is not None},
        )

    def run_settings(self) -> dict[str, Any]:
        """Return what is recorded with a run."""
        return self.model_dump(mode="json", include={*RUN_SETTINGS, *CHANGEABLE_SETTINGS})

    def going_on_with(self, recorded: Mapping[str, Any]) -> Self:
        """Return the settings with which a run goes on that was begun with `recorded`.

        A changeable setting that isn't given stays what it was. If an earlier version of the
        software began the run, that is so for all its settings: today's defaults may be others.
        """
        is_of_today = recorded.keys() >= {*RUN_SETTINGS, *CHANGEABLE_SETTINGS}
        names = CHANGEABLE_SETTINGS if is_of_today else (*RUN_SETTINGS, *CHANGEABLE_SETTINGS)
        begun_with = settings_begun_with(recorded)
        kept = {name: begun_with[name] for name in names if name not in self.model_fields_set}
        return self.model_copy(update=kept)


def settings_begun_with(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that is recorded with a run today, of a run that was begun with `recorded`.

    Settings that came later mean what the run did before there were any.
    """
    defaults = {
        name: ServerSettings.model_fields[name].get_default(call_default_factory=True)
        for name in (*RUN_SETTINGS, *CHANGEABLE_SETTINGS)
    }
    return {**defaults, **BEFORE_THEY_WERE_RECORDED, **recorded}


def differing_settings(
    settings: ServerSettings, recorded: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that make this another run than the one begun with `recorded`.

    The values are the recorded one and the one given now, by name.
    """
    wanted = settings.going_on_with(recorded).run_settings()
    begun_with = settings_begun_with(recorded)
    return {
        name: (begun_with[name], wanted[name])
        for name in RUN_SETTINGS
        if begun_with[name] != wanted[name]
    }

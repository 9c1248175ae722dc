"""The coordinator's settings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedrounds.cli import Settings
from fedrounds.types import (
    MAX_DURATION_S,
    MAX_INT32,
    MAX_UINT64,
    MAX_WEIGHT,
    AugmentationName,
    InitialisationName,
    OptimizerName,
    Partitioning,
    Schedule,
    ScheduleName,
    TrainingConfig,
)
from fedserver.evaluation_settings import ClientEvaluationSettings, GoalSettings
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
    "best_by",
    "stop_when",
    "patience",
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
"""The settings that identify a run: with other values it would be another run."""

CHANGEABLE_SETTINGS = ("keep_rounds",)
"""Recorded too, but a later start may give another value; without it the recorded value holds."""

BEFORE_THEY_WERE_RECORDED: Mapping[str, Any] = {
    "keep_rounds": "all",
    "best_by": "accuracy:max",
}
"""What a run of earlier software does, where that isn't what the setting's default says today."""

_TRAINING = TrainingConfig()
_SCHEDULE = Schedule()

CohortName = Literal["uniform", "data-size", "round-robin", "power-of-choice", "availability"]
Kept = Annotated[int, Field(ge=0)] | Literal["all"]


class ListeningSettings(Settings):
    """Where the server listens and keeps its files."""

    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; 0.0.0.0: all addresses of this machine",
    )
    port: int = Field(
        default=50051, ge=0, le=65535, description="port to listen on; 0: any free port"
    )
    state_dir: Path = Field(
        default=Path("state/server"),
        description="folder in which the server keeps everything that it needs after a restart",
    )
    export: Path | None = Field(
        default=None,
        description="file for the final model; none: model.safetensors in the state-dir",
    )
    summary: bool = Field(
        default=True,
        description="at the end print the table of rounds, and draw curve.png in the state-dir",
    )
    keep_updates: Kept = Field(
        default=0, description="keep the updates of this many finished rounds, or all"
    )
    keep_rounds: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default=10,
        description="keep the models of this many finished rounds, or all; the best model is "
        "always kept",
    )
    quarantine_bytes: int = Field(
        default=1_000_000_000,
        ge=0,
        description="keep at most this many bytes of refused updates; the oldest are deleted first",
    )
    min_free_bytes: int = Field(
        default=200_000_000,
        ge=0,
        description="open no round while the disk has fewer free bytes than this",
    )
    give_up_damaged: bool = Field(
        default=False,
        description="start although updates on the disk are damaged; clients are asked for new "
        "ones",
    )
    threads: int = Field(default=1, ge=1, description="number of threads for tensor work")

    @field_validator("host")
    @classmethod
    def _validate_host(cls, host: str) -> str:
        """Refuse a text that can't be a host; an IPv6 address may stand in brackets."""
        host = host.removeprefix("[").removesuffix("]")
        if not re.fullmatch(r"[^][/\s]+", host):
            raise ValueError("write a host's name or address, such as 0.0.0.0 or [::1]")
        if host.rpartition(":")[2].isdecimal() and host.count(":") == 1:
            raise ValueError("give the port by itself, with --port")
        return host


class LearningSettings(Settings):
    """Task and data."""

    task: str = Field(default="mnist-sample", description="name of a task, or package.module:task")
    data_root: Path | None = Field(
        default=None, description="folder of the data sets; none: the task chooses it"
    )
    partition: str = Field(
        default="iid",
        description="how a simulation splits the data among clients: iid, shards, classes, "
        "dirichlet, class-dirichlet, quantity",
    )
    num_partitions: int = Field(
        default=10,
        le=MAX_INT32,
        ge=1,
        description="number of parts that a simulation splits the data into",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="concentration of the partitions dirichlet, class-dirichlet and quantity",
    )
    shards_per_client: int | None = Field(
        default=None,
        le=MAX_INT32,
        ge=1,
        description="number of shards for each client, for --partition shards",
    )
    classes_per_client: int | None = Field(
        default=None,
        le=MAX_INT32,
        ge=1,
        description="number of classes for each client, for --partition classes",
    )
    seed: int = Field(
        default=0, le=MAX_UINT64, ge=0, description="seed of all random numbers of the run"
    )
    init: InitialisationName = Field(
        default="default",
        description="how to initialise the first global model (torch.nn.init); default: as the "
        "task does",
    )


class RoundSettings(Settings):
    """Rounds."""

    rounds: int = Field(default=10, le=MAX_INT32, ge=1, description="number of rounds in the run")
    strategy: str = Field(
        default="fedavg",
        description="how updates become the next model, such as krum or nnm+median+fedadam; "
        "`python -m fedserver strategies` lists all",
    )
    strategy_parameters: dict[str, float] = Field(
        default_factory=dict,
        description="numbers for the strategy, such as f=2,server_lr=0.03; in a TOML file a table",
    )


class CohortSettings(Settings):
    """Which clients a round asks, and how many must answer."""

    min_clients: int = Field(
        default=2, ge=1, description="number of clients that must be there before a round opens"
    )
    clients_per_round: int = Field(
        default=0, ge=0, description="number of clients in a cohort; 0: all that are there"
    )
    cohort: CohortName = Field(
        default="uniform",
        description="how a cohort is chosen: at random (uniform), at random in proportion to "
        "the number of examples (data-size), the clients that were asked least "
        "(round-robin), the clients with the largest losses (power-of-choice), at "
        "random by how likely a client is to answer (availability)",
    )
    cohort_candidates: int = Field(
        default=0,
        ge=0,
        description="number of clients from which power-of-choice chooses; 0: twice the size of "
        "the cohort",
    )
    concurrency: int = Field(
        default=0,
        ge=0,
        description="number of clients that an asynchronous strategy keeps at work; 0: all that "
        "are there",
    )
    max_staleness: int | None = Field(
        default=None,
        ge=0,
        description="end an order of an asynchronous run when its model is more than this many "
        "rounds old; none: never",
    )
    over_select: float = Field(
        default=1,
        ge=1,
        description="ask this many times --clients-per-round clients; the round closes without "
        "the slowest",
    )
    min_updates: int = Field(
        default=0,
        ge=0,
        description="number of updates that a round needs; 0: the smaller of --min-clients and "
        "--clients-per-round, with --over-select --clients-per-round",
    )


class WaitingSettings(Settings):
    """How long the server waits for clients."""

    require_all: bool = Field(
        default=False, description="wait for every client of the cohort, without any time limit"
    )
    stall_after: float = Field(
        default=60,
        gt=0,
        description="give an order up when its client has been silent for this many seconds, or "
        "has made no progress for ten times its longest step so far and for at "
        "least this many seconds",
    )
    first_step: float = Field(
        default=600,
        gt=0,
        description="seconds that a client may take to pull its order, and again to finish its "
        "first training step",
    )
    min_examples_per_s: float = Field(
        default=0.1,
        gt=0,
        description="slowest training that the server waits for, in examples per second",
    )
    min_bytes_per_s: float = Field(
        default=10_000,
        gt=0,
        description="slowest transfer that the server waits for, in bytes per second",
    )
    round_deadline: float | None = Field(
        default=None,
        gt=0,
        description="close a round after this many seconds with the updates that are there; "
        "none: never",
    )
    lease: float = Field(
        default=30,
        le=MAX_DURATION_S,
        gt=0,
        description="seconds without a call after which a client counts as gone",
    )
    farewell: float = Field(
        default=10,
        ge=0,
        description="seconds that the server waits at the end until all clients know that the "
        "run is over",
    )


class RepairSettings(Settings):
    """What the server does when a round goes wrong."""

    max_attempts: int = Field(
        default=5, ge=1, description="number of attempts at one round before the run fails"
    )
    max_adjustments: int = Field(
        default=3,
        ge=0,
        description="number of steps by which the server may lower the learning rate, or clip "
        "gradients, when several clients report the same cause; 0: never",
    )
    max_rollbacks: int = Field(
        default=2,
        ge=0,
        description="number of times that each round may be repeated because its model is bad; "
        "0: never",
    )


class TrainingSettings(Settings):
    """How clients train."""

    epochs: int = Field(
        default=_TRAINING.epochs, le=MAX_INT32, ge=1, description="local epochs in a round"
    )
    batch_size: int = Field(
        default=_TRAINING.batch_size, le=MAX_INT32, ge=1, description="examples in a training step"
    )
    optimizer: OptimizerName = Field(default="sgd", description="optimizer of the clients")
    lr: float = Field(default=_TRAINING.lr, gt=0, description="learning rate of the clients")
    momentum: float = Field(
        default=_TRAINING.momentum, ge=0, lt=1, description="momentum of the clients' optimizer"
    )
    weight_decay: float = Field(
        default=_TRAINING.weight_decay, ge=0, description="weight decay of the clients' optimizer"
    )
    clip_norm: float | None = Field(
        default=_TRAINING.clip_norm,
        gt=0,
        description="clip gradients to this L2 norm; none: no clipping",
    )
    schedule: ScheduleName = Field(
        default="constant",
        description="how the learning rate falls: not at all (constant), by --decay every "
        "--decay-epochs epochs (step), or along a cosine to 0 (cosine)",
    )
    schedule_over: Literal["run", "round"] = Field(
        default="run",
        description="whether the schedule goes over all epochs of the run, or begins again in "
        "each round",
    )
    warmup_epochs: float = Field(
        default=_SCHEDULE.warmup_epochs,
        ge=0,
        description="number of epochs in which the learning rate rises to its full value",
    )
    decay_epochs: int = Field(
        default=_SCHEDULE.decay_epochs,
        le=MAX_INT32,
        ge=1,
        description="epochs between two decays of --schedule step",
    )
    decay: float = Field(
        default=_SCHEDULE.decay, gt=0, le=1, description="factor of each decay of --schedule step"
    )
    augment: AugmentationName = Field(
        default="none",
        description="random changes of the training inputs; shift: move images by up to 2 pixels",
    )
    work_deadline: float | None = Field(
        default=None,
        le=MAX_DURATION_S,
        gt=0,
        description="seconds after which a client stops training and sends what it has done; "
        "none: never",
    )
    stragglers: float = Field(
        default=0,
        ge=0,
        le=1,
        description="for experiments: in each round this share of the clients, chosen at "
        "random, trains only a random number of epochs from 1 to --epochs",
    )
    straggler_work: Literal["partial", "none"] = Field(
        default="partial",
        description="partial: stragglers send what they have done; none: stragglers aren't asked",
    )


class CompressionSettings(Settings):
    """How clients compress their updates."""

    compression: Literal["none", "float16", "bfloat16", "int8", "top-k"] = Field(
        default="none",
        description="how clients compress their updates: to 16 bits a value (float16, "
        "bfloat16), to 8 bits (int8), or to the largest changes alone (top-k)",
    )
    compression_block: int = Field(
        default=256,
        ge=8,
        le=65536,
        description="number of values that share one scale, for --compression int8",
    )
    compression_fraction: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="share of the changes that --compression top-k sends",
    )


class AdmissionSettings(Settings):
    """Which updates are accepted."""

    max_num_examples: int = Field(
        default=10_000_000,
        ge=1,
        lt=MAX_WEIGHT + 1,
        description="largest number of examples that an update may report; it is the update's "
        "weight",
    )
    max_delta_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest L2 norm of an update (local minus global model); none: 100 * (1 + "
        "norm of the global model)",
    )
    norm_band: float = Field(
        default=10,
        ge=0,
        description="exclude an update whose L2 norm is more than this many times what other "
        "clients' updates allow for its work; more with few clients, never with "
        "fewer than four; 0: never",
    )
    max_uploads: int = Field(
        default=16, ge=1, description="number of uploads that the server receives at the same time"
    )


class ServerSettings(
    AdmissionSettings,
    CompressionSettings,
    ClientEvaluationSettings,
    GoalSettings,
    TrainingSettings,
    RepairSettings,
    WaitingSettings,
    CohortSettings,
    RoundSettings,
    LearningSettings,
    ListeningSettings,
):
    """Run a federated-learning coordinator; it exits with 0 when the run is done.

    An unfinished run goes on when the server is started again with the same settings.
    Other commands: `history`, `show`, `curve`, `confusion`, `clients`, `export` and `verify`
    inspect a run, even while it goes on; `quarantine` decides on refused updates; `strategies`
    lists the values of --strategy. Each has its own --help.
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
        """Return the training configuration that is sent with every order of a round, from 1."""
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
        """The partitioning by which the clients of a simulation split the data."""
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
        """Return the settings that are recorded with a run, as JSON holds them."""
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
    """Return all settings that runs record today, for a run that was begun with `recorded`.

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
    """Return the settings by which this run differs from the run begun with `recorded`.

    By name: the recorded value and the value given now.
    """
    wanted = settings.going_on_with(recorded).run_settings()
    begun_with = settings_begun_with(recorded)
    return {
        name: (begun_with[name], wanted[name])
        for name in RUN_SETTINGS
        if begun_with[name] != wanted[name]
    }

"""The client's settings."""

import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedclient.routes import Route, choose_route, read_proxy
from fedrounds.cli import Settings
from fedrounds.diagnosis.values import Cause, DoctorSettings, RemedyPolicy
from fedrounds.types import MAX_CLIENT_ID, MAX_CLIENT_IDS, OptimizerName, TrainingConfig

_MAX_NAME_LENGTH = 100
_DEFAULTS = TrainingConfig()


class ConnectionSettings(Settings):
    """Client id, and the server."""

    id: int | None = Field(
        default=None,
        ge=0,
        le=MAX_CLIENT_ID,
        description="this client's number, different for every client",
    )
    ids: str | None = Field(
        default=None,
        description="the numbers of many clients in this process, such as 0-99 or 0,3,7-9",
    )
    server: str = Field(default="localhost:50051", description="the coordinator, host:port")
    proxy: str | None = Field(
        default=None,
        description="HTTP proxy on the way to the server, http://host:port; default: the variable "
        "grpc_proxy, if set",
    )
    state_dir: Path | None = Field(
        default=None,
        description="folder for everything that this client keeps; default: state/client-ID, or "
        "state/clients-IDS",
    )
    stay: bool = Field(
        default=False,
        description="after a run, wait for the next one, and read the data anew for it",
    )
    give_up_after: Annotated[float, Field(gt=0)] | Literal["never"] = Field(
        default=3600,
        description="end with exit code 3 after this many seconds without an answer of the "
        "server, or never",
    )
    will_restart: bool = Field(
        default=False,
        description="a service manager starts this process again after a stop: the server keeps "
        "its order for it, at most for a lease",
    )

    @field_validator("server")
    @classmethod
    def _validate_server(cls, server: str) -> str:
        """Refuse an impossible address; the client would wait for it forever."""
        parts = re.fullmatch(r"(\[[^][/\s]+\]|[^][/:\s]+):([0-9]{1,5})", server)
        if parts is None or not 0 < int(parts[2]) < 2**16:
            raise ValueError("write it as host:port, such as localhost:50051 or [::1]:50051")
        return server

    @field_validator("proxy")
    @classmethod
    def _validate_proxy(cls, proxy: str | None) -> str | None:
        if proxy is not None:
            read_proxy(proxy)
        return proxy

    @model_validator(mode="after")
    def _validate_route(self) -> Self:
        choose_route(self.server, proxy=self.proxy, environment=os.environ)
        return self

    @property
    def route(self) -> Route:
        """The way to the server."""
        return choose_route(self.server, proxy=self.proxy, environment=os.environ)

    @model_validator(mode="after")
    def _validate_ids(self) -> Self:
        if (self.id is None) == (self.ids is None):
            both = "" if self.id is None else ", not both"
            raise ValueError(
                f"say who this is: --id 3 for one client, or --ids 0-99 for many{both}"
            )
        client_ids = self.client_ids
        if len(set(client_ids)) < len(client_ids):
            twice = next(number for number in client_ids if client_ids.count(number) > 1)
            raise ValueError(f"--ids {self.ids} names client {twice} twice; name each once")
        if self.state_dir is None and len(self.folder.name) > _MAX_NAME_LENGTH:
            raise ValueError("--ids is too long for the name of a folder; give --state-dir")
        return self

    @property
    def client_ids(self) -> tuple[int, ...]:
        """The ids that this process serves."""
        if self.ids is None:
            assert self.id is not None
            return (self.id,)
        return tuple(itertools.chain.from_iterable(_read_ranges(self.ids)))

    @property
    def folder(self) -> Path:
        """The state-dir in force."""
        name = f"client-{self.id}" if self.ids is None else f"clients-{self.ids}"
        return self.state_dir or Path("state") / name.replace(" ", "")


def _read_ranges(ids: str) -> list[range]:
    """Return the ranges that a text such as `0,3,7-9` stands for."""
    ranges = []
    for word in ids.split(","):
        first, dash, last = (part.strip() for part in word.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
            raise ValueError(f"--ids is {ids!r}: write it as 0-99 or 0,3,7-9")
        if int(last) > MAX_CLIENT_ID:
            raise ValueError(f"--ids is {ids!r}: ids go up to 2^53")
        ranges.append(range(int(first), int(last) + 1))
    if sum(map(len, ranges)) > MAX_CLIENT_IDS:
        raise ValueError(f"--ids is {ids!r}: one process serves at most {MAX_CLIENT_IDS} clients")
    return ranges


class DataSettings(Settings):
    """Data."""

    task: str | None = Field(
        default=None,
        description="refuse runs with another task; default: the run's task, if it is built in",
    )
    source: Literal["partition", "local"] = Field(
        default="partition",
        description="partition: share ID of a public data set; local: all under --data-root",
    )
    data_root: Path | None = Field(default=None, description="folder of the data")


class SharesSettings(Settings):
    """Shares of a simulation."""

    partition: str = Field(
        default="iid", description="iid, shards, classes, dirichlet, class-dirichlet, quantity"
    )
    num_partitions: int = Field(default=10, ge=1, description="number of shares")
    alpha: float | None = Field(
        default=None, gt=0, description="parameter of dirichlet, class-dirichlet, quantity"
    )
    shards_per_client: int | None = Field(default=None, ge=1, description="parameter of shards")
    classes_per_client: int | None = Field(default=None, ge=1, description="parameter of classes")
    seed: int = Field(default=0, ge=0, description="the run's seed")

    @property
    def scheme_parameters(self) -> dict[str, float]:
        """The numbers of the scheme that were given, by name."""
        return self.model_dump(
            include={"alpha", "shards_per_client", "classes_per_client"}, exclude_none=True
        )


class ComputeSettings(Settings):
    """Training on this machine."""

    device: str = Field(default="cpu", description="cpu, auto, cuda, cuda:1, mps")

    @field_validator("device")
    @classmethod
    def _validate_device(cls, device: str) -> str:
        """Refuse a name that no device can have; only torch knows which devices are present."""
        if not re.fullmatch(r"cpu|auto|mps|cuda(:[0-9]+)?", device):
            raise ValueError("write it as cpu, auto, cuda, cuda:1 or mps")
        return device

    threads: int = Field(
        default=1,
        ge=1,
        description="training threads; results repeat only for the same number of threads",
    )
    max_steps: int = Field(
        default=0,
        ge=0,
        description="most training steps in a round, after which the update is sent; 0: no limit",
    )
    log_steps: int = Field(
        default=0, ge=0, description="training steps between log lines; 0: no log lines"
    )


class DoctorOptions(Settings):
    """Doctor: what to do if training fails."""

    doctor: Literal["cure", "skip", "report", "off"] = Field(
        default="cure",
        description="cure: find the cause, remove it and go on; skip: leave the batch out; report: "
        "say why and stop; off: stop at the first value that isn't finite",
    )
    doctor_policies: dict[Cause, RemedyPolicy] = Field(
        default_factory=dict,
        description="exceptions from --doctor by cause, such as bad-data=skip,learning-rate=report",
    )
    max_remedies: int = Field(
        default=3, ge=0, description="most remedies in a round; the doctor then gives up"
    )
    doctor_bytes: int = Field(
        default=512 * 2**20, ge=0, description="bytes of memory for earlier states and batches"
    )
    report_samples: bool = Field(
        default=False, description="tell the server which examples were bad, by number"
    )

    @field_validator("doctor_policies", mode="before")
    @classmethod
    def _read_policies(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = (word.partition("=") for word in value.split(",") if word)
        return {cause.strip(): policy.strip() for cause, _, policy in pairs}

    @property
    def doctor_settings(self) -> DoctorSettings:
        """The settings of the doctor."""
        is_armed = self.doctor != "off"
        return DoctorSettings(
            is_armed=is_armed,
            default_policy=RemedyPolicy(self.doctor) if is_armed else RemedyPolicy.REPORT,
            policies=self.doctor_policies,
            max_remedies=self.max_remedies,
            memory_bytes=self.doctor_bytes,
            # The server draws another first model, or returns to a model that was good.
            stops_at_bad_start=True,
        )


class ClientSettings(DoctorOptions, ComputeSettings, DataSettings, ConnectionSettings):
    """Take part in a federated run, as one client or as many; exit code 0 when the run is done.

    Other commands: `doctor` checks whether a client is ready to join (`doctor --help`);
    `partitions` shows how a simulation deals out the data.
    After a stop or a crash, the same command with the same state-dir continues the work.
    """

    model_config = SettingsConfigDict(env_prefix="FEDCLIENT_", cli_prog_name="python -m fedclient")

    @model_validator(mode="after")
    def _validate_source(self) -> Self:
        if self.ids is not None and self.source == "local":
            raise ValueError(
                "--source local is one client's own data, and --ids are many clients; start one "
                "process with --id for each"
            )
        return self


class DoctorCommandSettings(SharesSettings, ComputeSettings, DataSettings):
    """Check a client's data, its initial weights (or a received model) and its first steps.

    Exit code 0: ready to train; 1: not ready. Nothing leaves this machine.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m fedclient doctor")

    id: int = Field(default=0, ge=0, le=2**53, description="this client's number")
    model: Path | None = Field(
        default=None,
        description="safetensors file of a model to check instead of initial weights: one from "
        "the server's state-dir or its export command",
    )
    steps: int = Field(default=50, ge=1, description="training steps to try")
    batch_size: int = Field(default=_DEFAULTS.batch_size, ge=1, description="examples in a step")
    optimizer: OptimizerName = Field(default="sgd", description="as the run's")
    lr: float = Field(default=_DEFAULTS.lr, gt=0, description="the run's learning rate")
    momentum: float = Field(default=_DEFAULTS.momentum, ge=0, lt=1, description="the run's")
    weight_decay: float = Field(default=_DEFAULTS.weight_decay, ge=0, description="the run's")
    clip_norm: float | None = Field(
        default=_DEFAULTS.clip_norm, gt=0, description="largest L2 norm of a gradient"
    )
    doctor_bytes: int = Field(
        default=512 * 2**20, ge=0, description="bytes of memory for earlier states and batches"
    )


class PartitionsSettings(SharesSettings):
    """Show how many examples of each label every client would hold, and draw it."""

    model_config = SettingsConfigDict(cli_prog_name="python -m fedclient partitions")

    task: str = Field(
        default="mnist-sample", description="a built-in task, or package.module:attribute"
    )
    data_root: Path | None = Field(default=None, description="folder of the data sets")
    out: Path | None = Field(default=None, description="draw it into this PNG (extra: plot)")

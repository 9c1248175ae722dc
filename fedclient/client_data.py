"""The data of a client process: the run's task, and the examples of each of its clients.

The clients of one process hold shares of one data set. If the task has load_labels, the set is read
once, and a client's share is cut out of it when its turn comes. Otherwise the task loads each
share, and the last few are kept.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fedclient.devices import find_device
from fedclient.settings import ClientSettings
from fedrounds.data import partition_indices
from fedrounds.errors import FederationError, InvalidInput, WrongSettings
from fedrounds.plugins import naming_task_errors
from fedrounds.stop_signals import interrupting
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.loading import load_examples
from fedrounds.tasks.task import (
    DataRequest,
    Examples,
    Partition,
    Task,
    count_examples,
    has_numbers,
    inspect_examples,
)
from fedrounds.training.determinism import repeatable
from fedrounds.training.trial import try_training_step
from fedrounds.types import Partitioning, SessionInfo

logger = logging.getLogger(__name__)

_NUM_SHARES_KEPT = 8
_NUM_CLIENTS_TRIED = 3


class ClientData:
    """The task and the examples of a run, once `load` has read them.

    Raises:
        InvalidInput: there is no task of the name in the settings.
    """

    def __init__(self, settings: ClientSettings) -> None:
        if settings.task is not None:
            # Refuse a wrong task now: the server may take long to answer.
            with interrupting():
                find_task(settings.task)
        self._settings = settings
        self._loaded_run_id = ""
        self._task: Task | None = None
        self._examples_of: Callable[[int], Examples] | None = None
        self._num_examples: tuple[int, ...] = ()
        self.num_unreadable = 0
        """How many clients take no part in the run because their data can't be loaded."""

    @property
    def task(self) -> Task:
        """The run's task."""
        assert self._task is not None
        return self._task

    def examples_of(self, client_id: int) -> Examples:
        """Return one client's examples."""
        assert self._examples_of is not None
        return self._examples_of(client_id)

    def load(self, session: SessionInfo) -> tuple[int, ...]:
        """Return each client's number of examples in a run; read them once a run.

        The data may have changed since the last run, so each run reads them anew.

        Raises:
            WrongSettings: the run's task is custom code, and the settings here don't name it.
            OwnCodeFailed: the task's code fails when it reads the data or in a trial step.
            FederationError: the task, its data, or one of the shares doesn't exist.
        """
        if self._loaded_run_id == session.run_id:
            return self._num_examples
        # Free the last run's examples first: there may not be room for both.
        self._loaded_run_id, self._examples_of = "", None
        if ":" in session.task and self._settings.task is None:
            raise WrongSettings(
                f"the run's task {session.task!r} is code of somebody's own; if you trust it and "
                f"have it here, start with --task {session.task}"
            )
        if self._settings.task not in (None, session.task):
            raise WrongSettings(
                f"the run's task is {session.task!r}, but --task insists on "
                f"{self._settings.task!r}; ask for the server that runs it, or leave --task out"
            )
        with interrupting():
            self._task = find_task(session.task)
            with naming_task_errors(f"task {session.task!r}: loading the data"):
                self._examples_of = _share_reader(self._task, session.partitioning, self._settings)
            self._num_examples = self._count_all()
            self._try_step()
        self._loaded_run_id = session.run_id
        return self._num_examples

    def _try_step(self) -> None:
        """Take a trial step on the examples of the client that has most.

        If it fails, the next two are tried, so that one client's bad data doesn't stop the others.
        If it fails for all three, the task fails.
        """
        sizes = zip(self._num_examples, self._settings.client_ids, strict=True)
        candidates = [client_id for size, client_id in sorted(sizes, reverse=True) if size > 0]
        device = find_device(self._settings.device)
        failure: FederationError | None = None
        for client_id in candidates[:_NUM_CLIENTS_TRIED]:
            try:
                with repeatable(num_threads=self._settings.threads):
                    try_training_step(self.task, self.examples_of(client_id), device=device)
            except FederationError as error:
                failure = failure or error
            else:
                return
        if failure is not None:
            raise failure

    def _count_all(self) -> tuple[int, ...]:
        """Return each client's number of examples, 0 for those whose data can't be loaded.

        The log names each client that takes no part, with the reason.

        Raises:
            FederationError: the data of none of the first three clients can be loaded, or no other
                client has examples.
        """
        self.num_unreadable, counts = 0, []
        empty = []
        failure: FederationError | None = None
        for client_id in self._settings.client_ids:
            what = f"task {self.task.name!r}: loading the data of client {client_id}"
            try:
                with naming_task_errors(what):
                    counts.append(self._count_examples(client_id))
                    if counts[-1] == 0:
                        empty.append(client_id)
            except FederationError as error:
                failure = failure or error
                self.num_unreadable += 1
                counts.append(0)
                if len(self._settings.client_ids) > 1:
                    logger.warning(
                        "client %d takes no part: %s", client_id, error, exc_info=error.__cause__
                    )
            if failure is not None and self.num_unreadable == len(counts) == _NUM_CLIENTS_TRIED:
                raise failure
        if failure is not None and not any(counts):
            raise failure
        if empty and any(counts):
            logger.warning(
                "client %s: no examples, takes no part; the others do", ", ".join(map(str, empty))
            )
        return tuple(counts)

    def _count_examples(self, client_id: int) -> int:
        """Return a client's number of examples; warn of those that would stop its training."""
        examples = self.examples_of(client_id)
        num_examples = count_examples(self.task, examples, loaded_by="load_train")
        if num_examples == 0:
            return 0
        if bad := inspect_examples(self.task, examples):
            logger.warning(
                "client %d: %d examples hold a NaN or an infinity, the first is number %d (from "
                "0); the first step that uses one goes wrong",
                client_id,
                len(bad),
                bad[0],
            )
        return num_examples


def _share_reader(
    task: Task, dealt: Partitioning, settings: ClientSettings
) -> Callable[[int], Examples]:
    """Return a function from client id to examples."""
    root, client_ids = settings.data_root, settings.client_ids
    if settings.source == "local":
        return functools.cache(lambda _: load_examples(task, DataRequest(data_root=root)))
    if (beyond := max(client_ids)) >= dealt.num_partitions:
        raise InvalidInput(
            f"client {beyond}: partition {beyond} of {dealt.num_partitions} doesn't exist; "
            f"partitions count from 0 to {dealt.num_partitions - 1}. Leave that id out, or start "
            f"the server with --num-partitions {beyond + 1}"
        )
    if len(client_ids) > 1 and task.load_labels is not None:
        # One partition is the whole set in its own order, which load_labels goes by.
        whole = load_examples(
            task,
            DataRequest(
                data_root=root, partition=Partition(num_partitions=1, index=0, seed=dealt.seed)
            ),
        )
        if isinstance(whole, DataLoader) or not has_numbers(whole):
            raise InvalidInput(
                f"task {task.name!r}: it has load_labels, so load_train must return a map-style "
                f"data set, of which each client gets its share, but it returned a "
                f"{type(whole).__name__}"
            )
        labels = task.load_labels(root)
        num_examples = count_examples(task, whole, loaded_by="load_train")
        if num_examples != len(labels):
            raise InvalidInput(
                f"task {task.name!r}: load_labels gives {len(labels)} labels, but load_train "
                f"{num_examples} examples for one partition; each example needs one label"
            )
        shares = partition_indices(
            labels,
            scheme=dealt.scheme,
            num_partitions=dealt.num_partitions,
            seed=dealt.seed,
            parameters=dealt.parameters,
        )
        return lambda client_id: _cut(whole, shares[client_id])

    @functools.lru_cache(maxsize=_NUM_SHARES_KEPT)
    def load(client_id: int) -> Examples:
        partition = Partition(
            scheme=dealt.scheme,
            num_partitions=dealt.num_partitions,
            index=client_id,
            seed=dealt.seed,
            parameters=dealt.parameters,
        )
        return load_examples(task, DataRequest(data_root=root, partition=partition))

    return load


def _cut(whole: Dataset[Any], share: NDArray[np.int64]) -> Examples:
    """Return the examples of a share; tensors are copied, so that batches are quick."""
    if isinstance(whole, TensorDataset):
        chosen = torch.from_numpy(share)
        return TensorDataset(*(tensor[chosen] for tensor in whole.tensors))
    return Subset(whole, share.tolist())

"""What a client learns from: the run's task, and the examples that are its own."""

import logging

from fedclient.settings import ClientSettings
from shared.errors import WrongSettings
from shared.tasks import DataRequest, Examples, Partition, Task, examine_examples, find_task
from shared.types import SessionInfo

logger = logging.getLogger(__name__)


class Holdings:
    """The task and the examples, once `load` was told which run they are for."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._loaded: tuple[SessionInfo, Task, Examples] | None = None

    @property
    def task(self) -> Task:
        """The run's task."""
        assert self._loaded is not None
        return self._loaded[1]

    def examples_of(self, client_id: int) -> Examples:
        """Return one client's examples."""
        assert client_id == self._settings.id
        assert self._loaded is not None
        return self._loaded[2]

    def load(self, session: SessionInfo) -> tuple[int, ...]:
        """Load what a run asks for, if it isn't what is here; returns the number of examples.

        Raises:
            WrongSettings: the run's task is somebody's own code, and nobody here said to run it.
            FederationError: the task or its data can't be had.
        """
        examples = self._examples_for(session)
        return (len(examples),)  # type: ignore[arg-type]

    def _examples_for(self, session: SessionInfo) -> Examples:
        settings = self._settings
        if self._loaded is not None:
            known, _, examples = self._loaded
            if (known.task, known.partitioning) == (session.task, session.partitioning):
                return examples
        if ":" in session.task and settings.task is None:
            raise WrongSettings(
                f"the run's task {session.task!r} is code of somebody's own; if you trust it and "
                f"have it here, start with --task {session.task}"
            )
        task = find_task(session.task)
        dealt = session.partitioning
        partition = Partition(
            scheme=dealt.scheme,
            num_partitions=dealt.num_partitions,
            index=settings.id,
            seed=dealt.seed,
            parameters=dealt.parameters,
        )
        examples = task.load_train(
            DataRequest(
                data_root=settings.data_root,
                partition=partition if settings.source == "partition" else None,
            )
        )
        if bad := examine_examples(task, examples):
            logger.warning(
                "%d examples hold a NaN or an infinity, the first is number %d (from 0); training "
                "will stop where it meets one",
                *(len(bad), bad[0]),
            )
        self._loaded = (session, task, examples)
        return examples

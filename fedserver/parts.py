"""What the parts of the coordinator share: one of each for one run."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from fedserver.checkpoints import Checkpoints
from fedserver.disk import DiskWatch
from fedserver.downloads import Downloads
from fedserver.events import EventBus
from fedserver.orderbook import OrderBook
from fedserver.quarantine import QuarantineFolder
from fedserver.records import Run
from fedserver.sessions import Sessions
from fedserver.settings import ServerSettings
from fedserver.spool import Spool
from fedserver.store import AsyncStore
from fedserver.strategies.rows import Strategy
from fedserver.workers import Workers
from shared.types import EntryKind


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The resources of one run; made by the composition root, which also ends them.

    `kinds` are of the entries of the model's state_dict, `ties` name the earlier entry that one is
    the same tensor as, `modules` are the dotted names of the model's modules, `strategy` is what
    the settings name.
    """

    settings: ServerSettings
    run: Run
    kinds: Mapping[str, EntryKind]
    ties: Mapping[str, str]
    modules: Set[str]
    strategy: Strategy
    store: AsyncStore
    spool: Spool
    quarantine: QuarantineFolder
    checkpoints: Checkpoints
    downloads: Downloads
    sessions: Sessions
    book: OrderBook
    bus: EventBus
    workers: Workers
    disk: DiskWatch

"""Whether a state-dir still holds what was written: database, ledger, rows, files, arithmetic.

It finds accidents: a flipped bit, a changed or missing row, a file with other bytes. Against
somebody who can rewrite everything, the ledger included, it proves nothing.

Nothing is written, and a server may go on beside it. What `--keep-updates`, `--keep-rounds` and the
quarantine have let go isn't kept, which is no finding.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedrounds.errors import InvalidInput, NotFound, StorageDamaged
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.components import UnfitCohort
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import build_model, kinds_of
from fedrounds.tensors.codec import digest_file, read_layout
from fedrounds.tensors.entries import running_variances, tied_entries
from fedrounds.types import MODEL_SECTION, EntryKind
from fedserver.ledger import LedgerEntry, LedgerUpdate
from fedserver.models.checkpoints import digest_blocks, model_path, state_path
from fedserver.phases import OrderState
from fedserver.records import AttemptRow, HeldState, HeldUpdate, Ledger, Run
from fedserver.run_context import strategy_of
from fedserver.run_settings import compression_of, recorded_settings, strategy_seed
from fedserver.store import Store
from fedserver.updates.payload import update_file
from fedserver.updates.spool import update_path
from fedserver.verification.chain import (
    chain_findings,
    every_entry,
    finished_rounds,
    round_label,
    row_findings,
    whole_entries,
)


class State(StrEnum):
    """The state of a file, or of a round that is aggregated again."""

    WHOLE = "whole"
    DAMAGED = "damaged"
    NOT_KEPT = "not kept"


class BlobKind(StrEnum):
    """What a file holds."""

    MODEL = "model"
    STATE = "server state"
    UPDATE = "update"
    HELD = "quarantined payload"


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file that its content names; `paths` are where it may lie, to be tried in this order.

    `name` is a model's digest or an update's order, `what` and `where` are for a person.
    """

    kind: BlobKind
    name: str
    digest: str
    what: str
    where: str
    paths: Sequence[Path]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was looked at, in a line, and how many findings there were."""

    num_findings: int
    summary: str


def verify(
    store: Store,
    state_dir: Path,
    runs: Sequence[Run],
    *,
    round_number: int | None,
    tell: Callable[[str], None],
) -> Verdict:
    """Look these runs over and `tell` of each thing that isn't what was written, in a sentence.

    With a `round_number` files and arithmetic are those of that round only; ledger and rows are
    always examined as a whole.

    Raises:
        NotFound: no such round is finished.
        InvalidInput: rounds can't be aggregated again for want of their task or strategy.
        StorageDamaged: the database can't be read any further.
    """
    findings: list[str] = []

    def find(finding: str) -> None:
        findings.append(finding)
        tell(finding)

    try:
        store.database.examine()
    except StorageDamaged as error:
        find(str(error))
    ledgers = [store.ledger.read_ledger(run.run_id) for run in runs]
    finished = {ledger.run_id: finished_rounds(ledger) for ledger in ledgers}
    wanted = [
        (ledger, number)
        for ledger in ledgers
        for number in finished[ledger.run_id]
        if round_number in (None, number)
    ]
    if round_number is not None and not wanted:
        raise NotFound(f"round {round_number} isn't finished; `history` shows those that are")
    words = []
    for name, find_in in (("chain", chain_findings), ("rows", row_findings)):
        of_this_kind = [finding for ledger in ledgers for finding in find_in(ledger)]
        for finding in of_this_kind:
            find(finding)
        words.append(f"{name} {State.DAMAGED if of_this_kind else State.WHOLE}")
    blobs = known_blobs(
        state_dir, ledgers, store.quarantine.held_updates(), round_number=round_number
    )
    states = {blob.name: inspect_blob(blob, find) for blob in blobs}
    for blob in _gone(
        store, ledgers, [blob for blob in blobs if states[blob.name] is State.NOT_KEPT]
    ):
        states[blob.name] = State.DAMAGED
        find(f"{blob.where}: {blob.what} is gone ({blob.paths[0]})")
    words += [
        _counted(kind, Counter(states[blob.name] for blob in blobs if blob.kind is kind))
        for kind in BlobKind
        # Most strategies keep no state.
        if kind is not BlobKind.STATE or any(blob.kind is kind for blob in blobs)
    ]
    entries = {ledger.run_id: whole_entries(ledger) for ledger in ledgers}
    outcomes = Counter(
        re_aggregate(entries[ledger.run_id].get(number), state_dir, states, find)
        for ledger, number in wanted
    )
    rest = [
        f"{outcomes[state]} {state}" for state in (State.NOT_KEPT, State.DAMAGED) if outcomes[state]
    ]
    words.append(
        f"{outcomes[State.WHOLE]} of {len(wanted)} re-aggregated"
        + (f" ({', '.join(rest)})" if rest else "")
    )
    num_rounds = _number_of("round", sum(len(numbers) for numbers in finished.values()))
    of_runs = "" if len(ledgers) == 1 else f" of {len(ledgers)} runs"
    return Verdict(num_findings=len(findings), summary=f"{num_rounds}{of_runs}: {', '.join(words)}")


def known_blobs(
    state_dir: Path,
    ledgers: Iterable[Ledger],
    held: Iterable[HeldUpdate],
    *,
    round_number: int | None = None,
) -> list[Blob]:
    """Return the files that ledgers and tables name, of all rounds or of one, each once.

    Of an update only what was acknowledged: others may be half there. Of all rounds, models that
    lie there unnamed belong to it too.
    """
    by_name: dict[str, Blob] = {}

    def add(kind: BlobKind, name: str, what: str, where: str, digest: str) -> None:
        if kind is BlobKind.MODEL:
            paths = [model_path(state_dir / "models", digest)]
        elif kind is BlobKind.STATE:
            paths = [state_path(state_dir / "models", digest)]
        else:
            # In this order, since a server may be moving it from the spool to the quarantine.
            paths = [
                update_path(state_dir / folder, name, digest) for folder in ("spool", "quarantine")
            ]
        blob = Blob(kind=kind, name=name, digest=digest, what=what, where=where, paths=paths)
        by_name.setdefault(name, blob)

    run_ids = {ledger.run_id for ledger in ledgers}
    for update in held:
        is_wanted = update.run_id in run_ids and round_number in (None, update.round_number)
        if _is_held(update) and is_wanted:
            what = f"the quarantined update of client {update.client_id}"
            where = round_label(update.run_id, update.round_number)
            add(BlobKind.HELD, update.order_id, what, where, update.digest)
    for ledger in ledgers:
        # Entries come first: that a row differs from its entry is reported elsewhere.
        attempts: list[LedgerEntry | AttemptRow] = [*every_entry(ledger).values(), *ledger.attempts]
        for attempt in attempts:
            if round_number not in (None, attempt.round_number):
                continue
            where = round_label(ledger.run_id, attempt.round_number)
            for kind, what, digest in (
                (BlobKind.MODEL, "its base model", attempt.base_digest),
                (BlobKind.STATE, "its base's server state", attempt.base_state_digest),
                (BlobKind.MODEL, "its model", attempt.model_digest),
                (BlobKind.STATE, "its server state", attempt.state_digest),
                *(
                    (
                        BlobKind.MODEL,
                        f"what client {sent.client_id} began with",
                        sent.base_digest,
                    )
                    for sent in attempt.updates
                ),
            ):
                if digest is not None:
                    add(kind, digest, what, where, digest)
            for sent in attempt.updates:
                if sent.delta_norm is not None:
                    what = f"the update of client {sent.client_id}"
                    add(BlobKind.UPDATE, sent.order_id, what, where, sent.digest)
    if round_number is None:
        for kind, ending in ((BlobKind.MODEL, "safetensors"), (BlobKind.STATE, "server-state")):
            for path in sorted((state_dir / "models").glob(f"*.{ending}")):
                add(kind, path.stem, f"a {kind}", str(state_dir), path.stem)
    return list(by_name.values())


def inspect_blob(blob: Blob, find: Callable[[str], None]) -> State:
    """Compare a file's bytes with its digest; say what is wrong with it, if something is."""
    for path in blob.paths:
        try:
            actual = digest_file(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            find(f"{blob.where}: {blob.what} can't be read ({error.strerror}: {path})")
            return State.DAMAGED
        if actual == blob.digest:
            return State.WHOLE
        find(f"{blob.where}: {blob.what} holds other bytes than were written ({path})")
        return State.DAMAGED
    return State.NOT_KEPT


def re_aggregate(
    entry: LedgerEntry | None,
    state_dir: Path,
    states: Mapping[str, State],
    find: Callable[[str], None],
) -> State:
    """Make a finished round's model and server state again, and compare the bytes.

    `entry` is the round's whole entry, if it has any; `states` has each file's state, by name.
    If a file that the round rests on is damaged, returns DAMAGED without reporting that again.
    """
    if entry is None:
        return State.DAMAGED
    counted = [update for update in entry.updates if update.verdict == OrderState.COUNTED]
    models = [entry.base_digest]
    models += [update.base_digest for update in counted if update.base_digest is not None]
    server_states = [] if entry.base_state_digest is None else [entry.base_state_digest]
    names = [*models, *server_states, *(update.order_id for update in counted)]
    needed = {states[name] for name in names}
    if needed != {State.WHOLE}:
        return State.DAMAGED if State.DAMAGED in needed else State.NOT_KEPT
    where = round_label(entry.run_id, entry.round_number)
    paths = [
        *(model_path(state_dir / "models", digest) for digest in models),
        *(update_path(state_dir / "spool", update.order_id, update.digest) for update in counted),
        *(state_path(state_dir / "models", digest) for digest in server_states),
    ]
    try:
        made = _made_again(entry, counted, state_dir)
    except (FileNotFoundError, StorageDamaged, UnfitCohort) as error:
        if not all(path.exists() for path in paths):
            # A server has let them go meanwhile.
            return State.NOT_KEPT
        find(f"{where}: {error}")
        return State.DAMAGED
    outcome = State.WHOLE
    for what, digest, written in zip(
        ("model", "server state"), made, (entry.model_digest, entry.state_digest), strict=True
    ):
        if digest != written:
            outcome = State.DAMAGED
            find(
                f"{where}: aggregated again it gives {what} {_short(digest)}, in the ledger is "
                f"{_short(written)}"
            )
    return outcome


def _made_again(
    entry: LedgerEntry, counted: Sequence[LedgerUpdate], state_dir: Path
) -> tuple[str, str | None]:
    """Return the digests of what a round's strategy makes of its files: model and server state."""
    settings, models = recorded_settings(entry.settings), state_dir / "models"
    strategy = strategy_of(settings)
    kinds, ties, variances = _entries_of(settings.task)
    base_path = model_path(models, entry.base_digest)
    base = StateFile(path=base_path, layout=read_layout(base_path))
    if base.layout.entries.keys() != kinds.keys():
        raise InvalidInput(
            f"{round_label(entry.run_id, entry.round_number)}: the task {settings.task!r} makes "
            "a model of other tensors than the run's; verify with the code that the run was made "
            "with"
        )
    server_state = None
    if entry.base_state_digest is not None:
        path = state_path(models, entry.base_state_digest)
        server_state = StateFile(path=path, layout=read_layout(path))
    cohort = Cohort(
        base=base,
        updates=[
            update_file(
                (path := update_path(state_dir / "spool", update.order_id, update.digest)),
                base=base,
                kinds=kinds,
                compression=compression_of(settings, update.encoding),
                sections=update.sections or [(MODEL_SECTION, path.stat().st_size)],
                num_examples=update.num_examples,
                num_steps=update.num_steps,
                global_loss=update.global_loss,
                own_base=(
                    None if update.base_digest is None else model_path(models, update.base_digest)
                ),
                staleness=update.staleness,
            )
            for update in counted
        ],
        kinds=kinds,
        seed=strategy_seed(settings, entry.round_number, entry.attempt),
        ties=ties,
        variances=variances,
    )
    blocks = next_blocks(strategy, cohort, server_state)
    return digest_blocks(base.layout, blocks, state_layout=state_layout(strategy, cohort))


@functools.cache
def _entries_of(name: str) -> tuple[Mapping[str, EntryKind], Mapping[str, str], Set[str]]:
    """Return the kinds of a task's entries, which are tied, and which are running variances."""
    task = find_task(name)
    model = build_model(task)
    return kinds_of(task, model), tied_entries(model), running_variances(model)


def _gone(store: Store, ledgers: Iterable[Ledger], missing: Collection[Blob]) -> list[Blob]:
    """Return those of the missing files that nothing lets go: a run goes on from them."""
    if not missing:
        return []
    # Asked now: a server may have finished with them since the ledgers were read.
    needed = {held.order_id for held in store.quarantine.held_updates() if _is_held(held)}
    for ledger in ledgers:
        for attempt in store.ledger.read_ledger(ledger.run_id).attempts[-1:]:
            needed.add(attempt.model_digest or attempt.base_digest)
            state = attempt.state_digest if attempt.model_digest else attempt.base_state_digest
            if state is not None:
                needed.add(state)
            needed |= {
                update.order_id for update in attempt.updates if update.verdict == OrderState.STORED
            }
    return [blob for blob in missing if blob.name in needed]


def _is_held(held: HeldUpdate) -> bool:
    return held.state is HeldState.HELD and held.kept_bytes > 0


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _counted(kind: BlobKind, states: Counter[State]) -> str:
    num_kept = states[State.WHOLE] + states[State.DAMAGED]
    of_all = f"{states[State.WHOLE]} of " if states[State.DAMAGED] else ""
    return f"{of_all}{_number_of(kind, num_kept)} whole"


def _number_of(what: str, number: int) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

"""`python -m fedserver quarantine list|show|release|drop`: updates kept out of the global model.

Works beside a server that runs: the store's rows decide, and the server reads them before every
round.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from fedrounds.cli import USAGE_EXIT_CODE, parse
from fedrounds.errors import InvalidInput
from fedserver.commands.inspection import InspectionSettings, opened_run
from fedserver.events import event_of
from fedserver.records import HeldState, HeldUpdate, Run
from fedserver.reporting.tables import held_table
from fedserver.store import Store
from fedserver.updates.spool import update_path


class QuarantineSettings(InspectionSettings):
    """Inspect updates that were refused or excluded, and decide on them.

    list      all updates that are or were in quarantine
    show      an update's verdict, reason and evidence, and the file that holds its bytes
    release   the update was good: rounds ask its client again, and the norm band doesn't exclude
              the client any more (the update itself isn't averaged: its round is over)
    drop      delete the update's bytes
    """

    model_config = SettingsConfigDict(
        cli_prog_name="python -m fedserver quarantine list|show|release|drop"
    )

    order: str = Field(default="", description="id of the update's order; `list` shows it")


def run(argv: list[str]) -> None:
    """Run the action that the first argument names."""
    if not argv or argv[0] not in ACTIONS:
        if argv and argv[0] in ("-h", "--help"):
            parse(QuarantineSettings, argv)
        print(
            f"fedserver quarantine: say what to do: {', '.join(ACTIONS)} (see --help)",
            file=sys.stderr,
        )
        raise SystemExit(USAGE_EXIT_CODE)
    action, settings = ACTIONS[argv[0]], parse(QuarantineSettings, argv[1:])
    with opened_run(settings, to_write=action in (_release, _drop)) as (store, inspected):
        action(settings, store, inspected)


def _list(settings: QuarantineSettings, store: Store, inspected: Run) -> None:
    held = store.quarantine.held_updates(inspected.run_id)
    if not held:
        print(f"{inspected.run_id}: nothing was refused or excluded")
        return
    Console().print(
        held_table(held, title=f"{inspected.run_id}: quarantine in {settings.state_dir}")
    )


def _show(settings: QuarantineSettings, store: Store, _: Run) -> None:
    held = _find(settings, store)
    path = _payload(settings, held)
    payload = f"{path} ({held.kept_bytes} bytes)" if path.exists() else "not kept"
    print(
        f"order     {held.order_id}\n"
        f"client    {held.client_id}, round {held.round_number}\n"
        f"verdict   {held.verdict}, {held.state.lower()}\n"
        f"reason    {held.refusal.reason or 'the round had closed'}\n"
        f"evidence  {json.dumps(held.refusal.evidence)}\n"
        f"digest    {held.digest}\n"
        f"payload   {payload}"
    )


def _release(settings: QuarantineSettings, store: Store, _: Run) -> None:
    held = _end(settings, store, HeldState.RELEASED)
    print(f"released: client {held.client_id} is asked again, and its norm isn't screened any more")


def _drop(settings: QuarantineSettings, store: Store, _: Run) -> None:
    held = _end(settings, store, HeldState.DROPPED)
    print(f"dropped: the bytes of order {held.order_id} are deleted")


def _end(settings: QuarantineSettings, store: Store, state: HeldState) -> HeldUpdate:
    held = _find(settings, store)
    event = event_of(
        f"quarantine-{state.lower()}", client_id=held.client_id, order_id=held.order_id
    )
    if not store.quarantine.free_held(held, state, event):
        raise InvalidInput(f"order {held.order_id} is {held.state.lower()} already")
    _payload(settings, held).unlink(missing_ok=True)
    return held


def _payload(settings: QuarantineSettings, held: HeldUpdate) -> Path:
    """Return the path of an update's bytes, which are there while it is HELD."""
    return update_path(settings.state_dir / "quarantine", held.order_id, held.digest)


def _find(settings: QuarantineSettings, store: Store) -> HeldUpdate:
    if not settings.order:
        raise InvalidInput("say which update with --order; `quarantine list` shows them")
    return store.quarantine.find_held(settings.order)


Action = Callable[[QuarantineSettings, Store, Run], None]
ACTIONS: dict[str, Action] = {"list": _list, "show": _show, "release": _release, "drop": _drop}

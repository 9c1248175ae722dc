"""Updates that are trained but not acknowledged yet; they survive a crash of the process.

An update is a payload and, written after it, a description; it exists only with both. After a power
loss either may be missing or damaged: then the client trains the order again.
"""

import json
from dataclasses import asdict
from pathlib import Path

from fedrounds.files import replace_file
from fedrounds.tensors.codec import digest_file
from fedrounds.types import ClientUpdate, Section


class Outbox:
    """Owns the folder of these updates."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def payload_path(self, order_id: str) -> Path:
        """Return the path of the payload of an order's update."""
        return self._folder / f"{order_id}.safetensors"

    def draft_path(self, order_id: str) -> Path:
        """Return the path to write the payload to, before `put`."""
        return self._folder / f"{order_id}.draft"

    def put(self, update: ClientUpdate) -> None:
        """Keep an update, whose payload is at the draft path, until `drop`.

        Raises:
            OutOfSpace: the disk is full.
        """
        self.draft_path(update.order_id).replace(self.payload_path(update.order_id))
        description = asdict(update) | {"metrics": dict(update.metrics)}
        replace_file(
            self._description_path(update.order_id),
            json.dumps(description).encode(),
            survive_power_loss=False,
        )

    def find(self, order_id: str) -> ClientUpdate | None:
        """Return an order's update, None if it isn't here or is damaged."""
        try:
            description = json.loads(self._description_path(order_id).read_bytes())
            description["sections"] = tuple(Section(**fields) for fields in description["sections"])
            # Updates of earlier software have none.
            measurements = description.get("measurements", {})
            description["measurements"] = {
                name: tuple(values) for name, values in measurements.items()
            }
            update = ClientUpdate(**description)
            is_intact = digest_file(self.payload_path(order_id)) == update.digest
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return update if is_intact else None

    def waiting(self) -> list[ClientUpdate]:
        """Return all updates that are here, and delete the files of damaged updates."""
        updates = []
        for path in sorted(self._folder.iterdir()):
            order_id = path.name.partition(".")[0]
            update = self.find(order_id)
            if update is None:
                path.unlink()
            elif path.suffix == ".json":
                updates.append(update)
        return updates

    def order_ids(self) -> list[str]:
        """Return the ids of the orders whose updates are here, without checking their files."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def drop(self, order_id: str) -> None:
        """Delete an update that the server has acknowledged."""
        self._description_path(order_id).unlink(missing_ok=True)
        self.payload_path(order_id).unlink(missing_ok=True)

    def _description_path(self, order_id: str) -> Path:
        return self._folder / f"{order_id}.json"

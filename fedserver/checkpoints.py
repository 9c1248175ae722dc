"""Global models on disk: content-addressed safetensors files, whole or not there."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from fedserver.strategies.blocks import Block, BlockReader, StateFile, blocks_of
from shared.codec import Layout, digest_file, read_layout, write_state
from shared.errors import FederationError, NotFound, StorageDamaged
from shared.files import naming_full_disk, sync_folder
from shared.weights import EntryKind


class NonFiniteAggregate(FederationError):
    """The aggregate holds a NaN or an infinity; it is dropped and the base model stands."""


def model_path(folder: Path, digest: str) -> Path:
    """Return where in a folder of models the one of this digest lies."""
    return folder / f"{digest}.safetensors"


def digest_blocks(layout: Layout, blocks: Iterable[tuple[Block, torch.Tensor]]) -> str:
    """Return the digest of the file that `Checkpoints.save` writes from these blocks."""
    hasher = blake3(layout.header)
    for _, values in blocks:
        hasher.update(values.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class GlobalModel:
    """A global model on disk; `parameter_norm` is the L2 norm over all parameters."""

    digest: str
    file: StateFile
    parameter_norm: float


class Checkpoints:
    """Owns the folder of global models. Its methods block on the disk."""

    def __init__(self, folder: Path, kinds: Mapping[str, EntryKind]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kinds = kinds

    def path(self, digest: str) -> Path:
        """Where the model of this digest lies, there or not."""
        return model_path(self._folder, digest)

    def save_initial(self, state_dict: Mapping[str, torch.Tensor]) -> GlobalModel:
        """Write the model a run begins with."""
        draft = self._folder / "initial.draft"
        write_state(draft, state_dict)
        base = StateFile(path=draft, layout=read_layout(draft))
        reader = BlockReader()
        try:
            return self.save(
                base, ((block, reader.read(base, block)) for block in blocks_of(base.layout))
            )
        finally:
            draft.unlink()

    def save(self, base: StateFile, blocks: Iterable[tuple[Block, torch.Tensor]]) -> GlobalModel:
        """Write a model with the layout of `base` from its blocks, durable when this returns.

        Raises:
            NonFiniteAggregate: a block holds a NaN or an infinity; nothing is kept.
            OutOfSpace: the disk is full; nothing is kept.
        """
        draft = self._folder / "aggregate.draft"
        hasher = blake3(base.layout.header)
        squares = 0.0
        try:
            with naming_full_disk(self._folder), draft.open("wb") as file:
                file.write(base.layout.header)
                for block, values in blocks:
                    if values.is_floating_point():
                        squares += self._square_sum(block, values)
                    content = values.view(torch.uint8).numpy().data
                    hasher.update(content)
                    file.write(content)
                file.flush()
                os.fdatasync(file.fileno())
        except FederationError:
            draft.unlink(missing_ok=True)
            raise
        digest = hasher.hexdigest()
        path = self.path(digest)
        draft.replace(path)
        sync_folder(self._folder)
        return GlobalModel(
            digest=digest,
            file=StateFile(path=path, layout=base.layout),
            parameter_norm=squares**0.5,
        )

    def export(self, digest: str, to: Path) -> None:
        """Copy a model to a file of that name, whole or not at all.

        Raises:
            OutOfSpace: the disk is full.
        """
        draft = to.with_name(to.name + ".draft")
        with naming_full_disk(to.parent):
            shutil.copyfile(self.path(digest), draft)
            draft.replace(to)

    def digests(self) -> set[str]:
        """Return the digests of all models in the folder."""
        return {path.stem for path in self._folder.glob("*.safetensors")}

    def drop(self, digest: str) -> None:
        """Delete a model, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def load(self, digest: str) -> GlobalModel:
        """Find a model written before and examine that its content is still its name.

        Raises:
            NotFound: there is no such model.
            StorageDamaged: its bytes aren't those that were written.
        """
        path = self.path(digest)
        if not path.exists():
            raise NotFound(f"there is no model {digest} in {self._folder}")
        if (actual := digest_file(path)) != digest:
            raise StorageDamaged(
                f"{path} holds other bytes than its name says (digest {actual}); "
                "restore it from a copy"
            )
        file = StateFile(path=path, layout=read_layout(path))
        reader = BlockReader()
        squares = 0.0
        for block in blocks_of(file.layout):
            if file.layout.entries[block.name].dtype.is_floating_point:
                squares += self._square_sum(block, reader.read(file, block))
        return GlobalModel(digest=digest, file=file, parameter_norm=squares**0.5)

    def _square_sum(self, block: Block, values: torch.Tensor) -> float:
        # float32 is wide enough for a norm that only bounds the absurd.
        narrow = values if values.dtype is torch.float64 else values.float()
        square_sum = float(torch.dot(narrow, narrow))
        # A finite sum has finite terms, which is cheaper to see than each of them by itself.
        if not math.isfinite(square_sum):
            if not bool(torch.isfinite(values).all()):
                raise NonFiniteAggregate(
                    f"tensor {block.name!r} of the aggregate holds a NaN or an infinity in "
                    f"elements {block.begin} to {block.begin + block.count - 1}; the base model "
                    "stands"
                )
            wide = values.double()
            square_sum = float(torch.dot(wide, wide))
        return square_sum if self._kinds[block.name] is EntryKind.PARAMETER else 0.0

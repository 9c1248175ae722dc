"""Global models on disk: content-addressed safetensors files, whole or not there.

Beside a model may lie the server state that goes with it, named by its own content.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from blake3 import blake3

from fedrounds.errors import FederationError, NotFound, StorageDamaged
from fedrounds.files import (
    WRITE_BACK_BYTES,
    begin_write_back,
    naming_full_disk,
    sync_file,
    sync_folder,
)
from fedrounds.strategies.blocks import Block, BlockReader, NextBlock, StateFile, blocks_of
from fedrounds.tensors.codec import Layout, digest_file, read_layout, write_state
from fedrounds.types import EntryKind


class NonFiniteAggregate(FederationError):
    """The aggregate holds a NaN or an infinity; it is dropped and the base model stands."""


def model_path(folder: Path, digest: str) -> Path:
    """Return the path of the model with this digest in a folder of models."""
    return folder / f"{digest}.safetensors"


def state_path(folder: Path, digest: str) -> Path:
    """Return the path of the server state with this digest in a folder of models."""
    return folder / f"{digest}.server-state"


def digest_blocks(
    layout: Layout, blocks: Iterable[NextBlock], *, state_layout: Layout | None = None
) -> tuple[str, str | None]:
    """Return the digests of the files that `Checkpoints.save` writes: model and server state."""
    hasher = blake3(layout.header)
    state_hasher = None if state_layout is None else blake3(state_layout.header)
    for next_block in blocks:
        hasher.update(_content(next_block.values))
        if state_hasher is not None and next_block.moments is not None:
            state_hasher.update(_content(next_block.moments))
    return hasher.hexdigest(), None if state_hasher is None else state_hasher.hexdigest()


@dataclass(frozen=True)
class ServerState:
    """The server state beside a model: its server optimizer's moments, or control variates."""

    digest: str
    file: StateFile


@dataclass(frozen=True)
class GlobalModel:
    """A global model on disk; `parameter_norm` is the L2 norm over all parameters.

    `server_state` is what the step that made it left; None at the beginning of a run, and where the
    strategy keeps none.
    """

    digest: str
    file: StateFile
    parameter_norm: float
    server_state: ServerState | None = None

    @property
    def state_digest(self) -> str | None:
        """The digest of the server state, None if there is no state."""
        return None if self.server_state is None else self.server_state.digest


class Checkpoints:
    """Owns the folder of global models. Its methods block on the disk."""

    def __init__(self, folder: Path, kinds: Mapping[str, EntryKind]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kinds = kinds

    def path(self, digest: str) -> Path:
        """Return the path of the model with this digest, whether it exists or not."""
        return model_path(self._folder, digest)

    def find(self, digest: str) -> Path | None:
        """Return the path of the model or server state with this digest, None if there is none."""
        paths = (self.path(digest), state_path(self._folder, digest))
        return next((path for path in paths if path.is_file()), None)

    def save_initial(self, state_dict: Mapping[str, torch.Tensor]) -> GlobalModel:
        """Write the model a run begins with."""
        draft = self._folder / "initial.draft"
        write_state(draft, state_dict)
        base = StateFile(path=draft, layout=read_layout(draft))
        reader = BlockReader()
        try:
            return self.save(
                base,
                (NextBlock(block, reader.read(base, block)) for block in blocks_of(base.layout)),
            )
        finally:
            draft.unlink()

    def save(
        self,
        base: StateFile,
        blocks: Iterable[NextBlock],
        *,
        state_layout: Layout | None = None,
    ) -> GlobalModel:
        """Write a model with the layout of `base` from its blocks, durable when this returns.

        With a `state_layout` the blocks hold the server state too, which is written beside it.

        Raises:
            NonFiniteAggregate: a parameter holds a NaN or an infinity, or another entry does where
                the base's value is finite; nothing is kept.
            OutOfSpace: the disk is full; nothing is kept.
        """
        squares = 0.0
        base_reader = BlockReader()
        with ExitStack() as stack:
            stack.enter_context(naming_full_disk(self._folder))
            model = stack.enter_context(_Draft(self._folder / "aggregate.draft", base.layout))
            state = None
            if state_layout is not None:
                draft = _Draft(self._folder / "server-state.draft", state_layout)
                state = stack.enter_context(draft)
            for next_block in blocks:
                if self._kinds[next_block.block.name] is EntryKind.PARAMETER:
                    squares += _square_sum(next_block.block, next_block.values)
                elif not bool(next_block.values.isfinite().all()):
                    _validate_buffer(next_block, base_reader.read(base, next_block.block))
                model.append(next_block.values)
                if state is not None and next_block.moments is not None:
                    _validate_moments(next_block.block, next_block.moments)
                    state.append(next_block.moments)
            server_state = None
            if state is not None:
                digest = state.keep(lambda digest: state_path(self._folder, digest))
                file = StateFile(path=state_path(self._folder, digest), layout=state.layout)
                server_state = ServerState(digest, file)
            digest = model.keep(self.path)
        sync_folder(self._folder)
        return GlobalModel(
            digest=digest,
            file=StateFile(path=self.path(digest), layout=base.layout),
            parameter_norm=squares**0.5,
            server_state=server_state,
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
        """Return the digests of all models and server states in the folder."""
        kept = (*self._folder.glob("*.safetensors"), *self._folder.glob("*.server-state"))
        return {path.stem for path in kept}

    def drop(self, digest: str) -> None:
        """Delete a model or a server state, if it is there."""
        self.path(digest).unlink(missing_ok=True)
        state_path(self._folder, digest).unlink(missing_ok=True)

    def load(self, digest: str, *, state_digest: str | None = None) -> GlobalModel:
        """Return a model that was written before, after a check that its bytes are those written.

        `state_digest` is that of its server state.

        Raises:
            NotFound: there is no such model or server state.
            StorageDamaged: its bytes aren't those that were written.
        """
        file = _validated_file(self.path(digest), digest, what="model")
        reader = BlockReader()
        squares = 0.0
        for block in blocks_of(file.layout):
            if self._kinds[block.name] is EntryKind.PARAMETER:
                squares += _square_sum(block, reader.read(file, block))
        server_state = None
        if state_digest is not None:
            path = state_path(self._folder, state_digest)
            server_state = ServerState(
                state_digest, _validated_file(path, state_digest, what="server state")
            )
        return GlobalModel(digest, file, squares**0.5, server_state)


class _Draft:
    """A file that is being written; gone at the end of its context unless it was kept."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout = layout
        self._path = path
        self._file = path.open("wb")
        self._hasher = blake3(layout.header)
        self._written = self._begun = 0

    def __enter__(self) -> Self:
        self._file.write(self.layout.header)
        return self

    def append(self, values: torch.Tensor) -> None:
        content = _content(values)
        self._hasher.update(content)
        self._file.write(content)
        self._written += len(content)
        if self._written - self._begun >= WRITE_BACK_BYTES:
            count = self._written - self._begun
            begin_write_back(self._file.fileno(), offset=self._begun, count=count)
            self._begun = self._written

    def keep(self, named: Callable[[str], Path]) -> str:
        """Make the file durable under the name that its digest gives; returns the digest."""
        self._file.flush()
        sync_file(self._file.fileno())
        digest: str = self._hasher.hexdigest()
        self._path.replace(named(digest))
        return digest

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _content(values: torch.Tensor) -> memoryview:
    content: memoryview = values.contiguous().view(torch.uint8).numpy().data
    return content


def _square_sum(block: Block, values: torch.Tensor) -> float:
    # float32 is wide enough for a norm that only bounds the absurd.
    narrow = values if values.dtype is torch.float64 else values.float()
    square_sum = float(torch.dot(narrow, narrow))
    # A finite sum has finite terms, which is cheaper to see than each of them by itself.
    if not math.isfinite(square_sum):
        if not bool(torch.isfinite(values).all()):
            raise _non_finite(block)
        wide = values.double()
        square_sum = float(torch.dot(wide, wide))
    return square_sum


def _validate_buffer(next_block: NextBlock, base: torch.Tensor) -> None:
    """Refuse a NaN or an infinity where the base's value is finite.

    The base may hold them, such as a mask's -inf.
    """
    if bool((base.isfinite() & ~next_block.values.isfinite()).any()):
        raise _non_finite(next_block.block)


def _non_finite(block: Block) -> NonFiniteAggregate:
    return NonFiniteAggregate(
        f"tensor {block.name!r} of the aggregate holds a NaN or an infinity in elements "
        f"{block.begin} to {block.begin + block.count - 1}; the base model stands"
    )


def _validate_moments(block: Block, moments: torch.Tensor) -> None:
    if not bool(torch.isfinite(moments).all()):
        raise NonFiniteAggregate(
            f"the server state of tensor {block.name!r} holds a NaN or an infinity; the base model "
            "stands"
        )


def _validated_file(path: Path, digest: str, *, what: str) -> StateFile:
    if not path.exists():
        raise NotFound(f"there is no {what} {digest} in {path.parent}")
    if (actual := digest_file(path)) != digest:
        raise StorageDamaged(
            f"{path} holds other bytes than its name says (digest {actual}); restore it from a copy"
        )
    return StateFile(path=path, layout=read_layout(path))

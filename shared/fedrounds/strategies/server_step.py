"""One step of the global model: the aggregate, then the server optimizer, block by block.

The server state (an optimizer's moments) is an argument and a result; this module keeps none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedrounds.strategies.blocks import (
    BLOCK_ELEMENTS,
    Aggregator,
    Block,
    BlockFunction,
    BlockReader,
    Cohort,
    NextBlock,
    RowReader,
    StateFile,
    blocks_of,
    compute_blocks,
    elements_per_row,
)
from fedrounds.strategies.buffers import Bounded, Buffers, bound_buffers
from fedrounds.strategies.components import (
    LinearMap,
    Matrix,
    RobustAggregator,
    ServerOptimizer,
    Strategy,
    UnfitCohort,
)
from fedrounds.strategies.geometry import distances_between, squared_distances
from fedrounds.strategies.means import Weights, weighted_sum
from fedrounds.strategies.robust import median
from fedrounds.tensors.codec import Layout, make_layout
from fedrounds.tensors.rounding import rounded
from fedrounds.types import CONTROL_SECTION, EntryKind

_SORTED_AS_THEY_ARE = (torch.float32, torch.float64)
# The number of elements sorted at a time, so that they stay in the cache.
_SORTED_ELEMENTS = 256 * 1024


def next_blocks(
    strategy: Strategy,
    cohort: Cohort,
    server_state: StateFile | None = None,
    *,
    on_bounded: Callable[[Bounded], None] = lambda _: None,
) -> Iterator[NextBlock]:
    """Return every block of the next model, in the order of the base's bytes.

    Each entry becomes what its kind says (see fedrounds.tensors.entries). The strategy aggregates
    parameters and, once they are bounded, entries of kind MEAN (see fedrounds.strategies.buffers);
    the server optimizer then moves parameters only. Tied entries stay equal. Updates without
    examples don't count; if none counts, the aggregate is the base. `server_state` is what
    the step before left, None at the beginning. `on_bounded` is called for each bounded entry of an
    update, before this function returns.

    Raises:
        UnfitCohort: the strategy can't be applied to these updates.
        StorageDamaged: one of the files is shorter than its layout, or gone.
    """
    updates = [update for update in cohort.updates if update.num_examples > 0]
    buffers = bound_buffers(replace(cohort, updates=updates))
    cohort = buffers.cohort
    for bounded in buffers.bounded:
        on_bounded(bounded)
    updates = list(cohort.updates)
    if updates and len(updates) < strategy.min_updates:
        raise UnfitCohort(
            f"strategy {strategy.name} needs at least {strategy.min_updates} updates, but only "
            f"{len(updates)} count"
        )
    begin_aggregate = strategy.aggregator(cohort) if updates else _base_of(cohort)
    optimizer = strategy.optimizer_for(len(updates))
    begin_control = _control_of(strategy, cohort)

    def begin() -> Callable[[Block], NextBlock]:
        aggregate, reader = begin_aggregate(), BlockReader()
        control = begin_control() if begin_control else None

        def compute(block: Block) -> NextBlock:
            source = replace(block, name=cohort.ties.get(block.name, block.name))
            dtype = cohort.base.layout.entries[source.name].dtype
            settled = _settled(reader, buffers, source)
            if settled is not None:
                return NextBlock(block, settled)
            values = aggregate(source)
            if cohort.kinds[source.name] is EntryKind.MEAN:
                mean = rounded(values, dtype)
                return NextBlock(block, _where_finite(mean, reader.read(cohort.base, source)))
            if optimizer is None:
                return NextBlock(block, rounded(values, dtype))
            # A copy: the reader's next read is into the same memory.
            base = reader.read(cohort.base, source).to(torch.float64, copy=True)
            moments = _moments(optimizer, server_state, source, reader)
            if control is not None:
                moments[:, 0] += control(source)
            move, moments = optimizer.step(values - base, moments)
            moments = moments.to(_state_dtype(dtype), copy=True)
            return NextBlock(block, rounded(base + move, dtype), moments)

        return compute

    longest = elements_per_row(len(updates) + 1)
    return compute_blocks(blocks_of(cohort.base.layout, max_elements=longest), begin)


def state_layout(strategy: Strategy, cohort: Cohort) -> Layout | None:
    """Return the layout of the server state after a step, None if there is none.

    The file has an entry for each parameter, of its shape plus a last dimension for the moments, so
    that it can be written in the order of the model's blocks.
    """
    optimizer = strategy.optimizer_for(len(cohort.updates))
    if optimizer is None:
        return None
    num_moments = len(optimizer.initial)
    return make_layout(
        {
            name: (_state_dtype(entry.dtype), (*entry.shape, num_moments))
            for name, entry in cohort.base.layout.entries.items()
            if cohort.kinds[name] is EntryKind.PARAMETER
        }
    )


def control_layout(base: Layout, kinds: Mapping[str, EntryKind]) -> Layout:
    """Return the layout of a client's section "control": an entry for each parameter."""
    return make_layout(
        {
            name: (_state_dtype(entry.dtype), entry.shape)
            for name, entry in base.entries.items()
            if kinds[name] is EntryKind.PARAMETER
        }
    )


def map_and_reduce(linear_maps: Sequence[LinearMap], robust: RobustAggregator) -> Aggregator:
    """Return the aggregator that applies these maps, then `robust`: its selection, its reduction.

    The maps mix parameters only. A float buffer must not do what the maps keep a parameter from
    doing, so behind any map the float buffers become their median, whatever `robust` is.
    """
    all_maps = [*linear_maps, *([robust.select] if robust.select else [])]

    def prepare(cohort: Cohort) -> Callable[[], BlockFunction]:
        coefficients = _chained(all_maps, cohort)

        def begin() -> BlockFunction:
            of_buffers = _Coordinates(cohort, median() if linear_maps else robust)
            if coefficients is None:
                of_parameters: BlockFunction = of_buffers
            elif len(coefficients) == 1:
                of_parameters = weighted_sum(
                    cohort,
                    _weights_of(coefficients[0]),
                    reader=BlockReader(),
                    accumulator=torch.empty(BLOCK_ELEMENTS, dtype=torch.float64),
                )
            else:
                of_parameters = _Coordinates(cohort, robust, coefficients)

            def compute(block: Block) -> torch.Tensor:
                is_parameter = cohort.kinds[block.name] is EntryKind.PARAMETER
                return of_parameters(block) if is_parameter else of_buffers(block)

            return compute

        return begin

    return prepare


class _Coordinates:
    """One thread's coordinate-wise reduction of the updates, or of linear combinations of them."""

    def __init__(
        self, cohort: Cohort, robust: RobustAggregator, coefficients: Matrix | None = None
    ) -> None:
        self._reduce = robust.reduce
        self._coefficients = None
        files = cohort.updates
        if coefficients is not None:
            files = [cohort.base, *cohort.updates]
            chosen = coefficients.argmax(axis=1)
            if np.array_equal(coefficients, np.eye(len(files))[chosen]):
                files = [files[index] for index in chosen]
            else:
                self._coefficients = coefficients
        self._rows = RowReader(files)

    def __call__(self, block: Block) -> torch.Tensor:
        """Return the block's reduced values, float64 [count]."""
        values = self._rows.read(block)
        if values.dtype not in _SORTED_AS_THEY_ARE:
            # float32 holds all narrower floats, float64 all counts.
            values = values.double() if not values.is_floating_point() else values.float()
        num_rows = len(values) if self._coefficients is None else len(self._coefficients)
        reduced = np.empty(block.count)
        step = max(1, _SORTED_ELEMENTS // num_rows)
        for begin in range(0, block.count, step):
            part = values[:, begin : begin + step]
            if self._coefficients is not None:
                # einsum, not @: NumPy's own loop, the same for any number of threads.
                part = torch.from_numpy(
                    np.einsum("ij,jk->ik", self._coefficients, part.double().numpy())
                )
            ascending = part.T.contiguous().numpy()
            ascending.sort(axis=1)
            # Adding zero makes -0.0 into 0.0: sorting may put either first.
            reduced[begin : begin + step] = self._reduce(ascending) + 0.0
        return torch.from_numpy(reduced)


def _chained(linear_maps: Sequence[LinearMap], cohort: Cohort) -> Matrix | None:
    """Return the coefficients of base and updates that applying all maps in order gives.

    [num_points, num_updates + 1]; None if there are no maps.
    """
    if not linear_maps:
        return None
    num_updates = len(cohort.updates)
    coefficients = np.eye(num_updates + 1)
    squared = np.zeros((num_updates + 1, num_updates + 1))
    if any(linear_map.needs_distances for linear_map in linear_maps):
        squared = squared_distances(cohort)
    for number, linear_map in enumerate(linear_maps):
        applied = linear_map.apply(squared, cohort.seed)
        is_last = number == len(linear_maps) - 1
        if not is_last:
            squared = distances_between(squared, applied)
            # The base stays the first of the points.
            applied = np.vstack([np.eye(1, applied.shape[1]), applied])
        coefficients = np.einsum("ij,jk->ik", applied, coefficients)
    return coefficients


def _weights_of(coefficients: Matrix) -> Weights:
    """Return a point's coefficients as weights, as exact integers if all updates count the same."""
    of_base, *of_updates = coefficients.tolist()
    used = {value for value in of_updates if value}
    if len(used) == 1 and of_base == 0:
        weights = [int(value > 0) for value in of_updates]
        return Weights(weights, sum(weights))
    return Weights(of_updates, 1.0, of_base=of_base)


def _settled(reader: BlockReader, buffers: Buffers, block: Block) -> torch.Tensor | None:
    """Return the next values of a block that the strategy doesn't compute, None if it does."""
    cohort = buffers.cohort
    kind = cohort.kinds[block.name]
    if kind.is_constant or block.name in buffers.unchanged:
        return reader.read(cohort.base, block).clone()
    if kind is EntryKind.MAX:
        return _largest(reader, cohort, block)
    if block.name in buffers.agreed:
        return reader.read(cohort.updates[0], block).clone()
    return None


def _largest(reader: BlockReader, cohort: Cohort, block: Block) -> torch.Tensor:
    """Return the elementwise maximum of base and updates, ignoring NaN."""
    largest = reader.read(cohort.base, block).clone()
    # fmax doesn't take integers and bool, which have no NaN.
    maximum = torch.fmax if largest.is_floating_point() else torch.maximum
    for update in cohort.updates:
        largest = maximum(largest, reader.read(update, block))
    return largest


def _where_finite(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return `values`, with the base's element wherever neither is finite."""
    is_finite = values.isfinite()
    if bool(is_finite.all()):
        return values
    return torch.where(is_finite | base.isfinite(), values, base)


def _base_of(cohort: Cohort) -> Callable[[], BlockFunction]:
    def begin() -> BlockFunction:
        reader = BlockReader()
        return lambda block: reader.read(cohort.base, block).double()

    return begin


def _control_of(strategy: Strategy, cohort: Cohort) -> Callable[[], BlockFunction] | None:
    """Return what makes the sums for the control variates' blocks, None if there are none."""
    algorithm = strategy.client_algorithm
    if algorithm is None or algorithm.control_share is None or not cohort.updates:
        return None
    share = algorithm.control_share(len(cohort.updates))
    changes = [update.others[CONTROL_SECTION] for update in cohort.updates]
    weights = Weights([1] * len(changes), len(changes) / share)

    def begin() -> BlockFunction:
        accumulator = torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)
        return weighted_sum(
            replace(cohort, updates=changes), weights, reader=BlockReader(), accumulator=accumulator
        )

    return begin


def _moments(
    optimizer: ServerOptimizer,
    server_state: StateFile | None,
    block: Block,
    reader: BlockReader,
) -> torch.Tensor:
    """Return a block's moments before the step, float64 [count, num_moments]."""
    num_moments = len(optimizer.initial)
    if server_state is None:
        initial = torch.tensor(optimizer.initial, dtype=torch.float64)
        return initial.expand(block.count, num_moments).clone()
    interleaved = Block(block.name, block.begin * num_moments, block.count * num_moments)
    return reader.read(server_state, interleaved).double().view(block.count, num_moments)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32

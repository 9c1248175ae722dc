"""Partition a labelled data set into the private shares of many clients.

Each client computes the whole partition and keeps its own share, so that clients needn't talk to
each other. A partition depends only on (labels, scheme, num_partitions, seed, parameters). Each
index is in exactly one share, shares are sorted, and none is empty.

A scheme is a function `(labels, num_partitions, rng, *, its own parameters) -> shares`; add
it to PARTITIONERS. A scheme needn't sort its shares or look for empty shares.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedrounds.errors import InvalidInput

Indices = NDArray[np.int64]
Labels = NDArray[np.int64]
Partitioner = Callable[..., list[Indices]]

_SMALLEST_SHARE = 10
_NUM_DRAWS = 300


def partition_indices(
    labels: Labels,
    *,
    scheme: str = "iid",
    num_partitions: int,
    seed: int,
    parameters: Mapping[str, float] = MappingProxyType({}),
) -> list[Indices]:
    """Cut the examples labelled `labels` [n] into `num_partitions` shares.

    `parameters` are the scheme's own, by name; a parameter that is left out has its default.

    Returns:
        `num_partitions` sorted int64 arrays of indices into `labels`; together every index once.

    Raises:
        InvalidInput: unknown scheme, a parameter out of range or not of this scheme, or a
            share would be empty.
    """
    own = validate_scheme(scheme, parameters)
    if num_partitions < 1:
        raise InvalidInput(f"num_partitions must be at least 1, but is {num_partitions}")
    if seed < 0:
        raise InvalidInput(f"the seed of a partition can't be negative, but is {seed}")
    if len(labels) < num_partitions:
        raise InvalidInput(
            f"{len(labels)} examples can't be cut into {num_partitions} shares without empty "
            f"ones; use at most {len(labels)} partitions or more data"
        )
    rng = np.random.default_rng((seed, num_partitions))
    shares = [
        np.sort(share)
        for share in PARTITIONERS[scheme](np.asarray(labels), num_partitions, rng, **own)
    ]
    for index, share in enumerate(shares):
        if share.size == 0:
            raise InvalidInput(
                f"partition {index} of {num_partitions} would be empty under the scheme "
                f"{scheme!r} with {len(labels)} examples; use fewer partitions, more data or "
                f"another scheme"
            )
    return shares


def split_iid(labels: Labels, num_partitions: int, rng: np.random.Generator) -> list[Indices]:
    """Shuffle and cut evenly: sizes differ by at most one.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", section 3, "IID".
    """
    return np.array_split(rng.permutation(len(labels)), num_partitions)


def split_shards(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    shards_per_client: int = 2,
) -> list[Indices]:
    """Sort by label, cut into equal shards, deal each client `shards_per_client` at random.

    McMahan et al. 2017, section 3, "Pathological Non-IID": with two shards a client sees at
    most two classes, or a few more where a shard crosses from one class into the next. Sizes
    differ by at most one example a shard.

    Raises:
        InvalidInput: more shards in all than there are examples.
    """
    # The number may be a server's: each shard takes memory, an empty shard too.
    if num_partitions * shards_per_client > len(labels):
        raise InvalidInput(
            f"{num_partitions} partitions of shards_per_client={shards_per_client} are more shards "
            f"than the {len(labels)} examples; use fewer shards a client, fewer partitions or more "
            "data"
        )
    by_label = np.argsort(labels, kind="stable")
    shards = np.array_split(by_label, num_partitions * shards_per_client)
    dealt = rng.permutation(len(shards)).reshape(num_partitions, shards_per_client)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def split_classes(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    classes_per_client: int = 2,
) -> list[Indices]:
    """Give each client exactly `classes_per_client` classes; owners share a class evenly.

    Li, Diao, Chen, He 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study"
    (NIID-Bench), quantity-based label imbalance, "#C = k". Theirs lets chance decide who owns
    which class; here the least owned classes go first, so that numbers of owners differ by at
    most one and no class is left without an owner.

    Raises:
        InvalidInput: more classes a client than there are, or too few to place every class.
    """
    classes = np.unique(labels)
    if classes_per_client > len(classes):
        raise InvalidInput(
            f"classes_per_client={classes_per_client}, but the data has {len(classes)} classes"
        )
    if num_partitions * classes_per_client < len(classes):
        raise InvalidInput(
            f"{num_partitions} partitions of {classes_per_client} classes can't hold all "
            f"{len(classes)} classes; use more partitions or more classes a client"
        )
    owners: list[list[int]] = [[] for _ in classes]
    for client in range(num_partitions):
        num_owners = np.array([len(of_class) for of_class in owners])
        ties = rng.random(len(classes))
        for chosen in np.lexsort((ties, num_owners))[:classes_per_client]:
            owners[chosen].append(client)
    pieces: list[list[Indices]] = [[] for _ in range(num_partitions)]
    for label, of_class in zip(classes, owners, strict=True):
        examples = rng.permutation(np.flatnonzero(labels == label))
        for client, piece in zip(of_class, np.array_split(examples, len(of_class)), strict=True):
            pieces[client].append(piece)
    return [np.concatenate(piece) for piece in pieces]


def split_dirichlet(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
) -> list[Indices]:
    """Give each client equally many examples, its classes in proportions q ~ Dir(alpha * p).

    Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", "Synthetic Non-Identical Client Data". p are the data's own class
    proportions; alpha towards 0 gives one class a client, alpha = 100 is close to IID. Drawn
    without replacement: where a class is used up, q is renormalised over those left, so the
    clients served last are the least true to their q.
    """
    classes, counts = np.unique(labels, return_counts=True)
    stock = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    left = counts.copy()
    # The clients come in random order, or the last clients would always be those with leftovers.
    shares: list[Indices] = [np.empty(0, np.int64)] * num_partitions
    sizes = _even_sizes(len(labels), num_partitions)
    for client in rng.permutation(num_partitions):
        q = rng.dirichlet(alpha * counts / counts.sum())
        taken = np.zeros_like(left)
        while (need := sizes[client] - taken.sum()) > 0:
            wanted = np.where(left > 0, q, 0.0)
            if not wanted.sum() > 0:  # all of q lies on classes that are used up
                wanted = left.astype(np.float64)
            # Each pass ends with need met or with at least one more class used up.
            step = np.minimum(rng.multinomial(need, wanted / wanted.sum()), left)
            taken += step
            left -= step
        stops = left + taken
        shares[client] = np.concatenate([stock[k][left[k] : stops[k]] for k in range(len(classes))])
    return shares


def split_class_dirichlet(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
) -> list[Indices]:
    """Deal each class out in proportions p ~ Dir(alpha, ..., alpha) over the clients.

    Li et al. 2022 (NIID-Bench), "Distribution-based label imbalance": sizes differ too. As in their
    code a client that has its even share of all examples gets nothing of the classes after, and all
    is drawn again until each has at least 10 examples (or its even share, if that is less). With
    ten classes, alpha here is about as skewed as 10 alpha in `split_dirichlet`.

    Raises:
        InvalidInput: some client had too few in every draw.
    """
    classes, counts = np.unique(labels, return_counts=True)
    even = len(labels) / num_partitions
    smallest = min(_SMALLEST_SHARE, math.floor(even))
    for _ in range(_NUM_DRAWS):
        dealt = np.zeros((len(classes), num_partitions), np.int64)
        sizes = np.zeros(num_partitions, np.int64)
        for of_class, count in zip(dealt, counts, strict=True):
            has_room = sizes < even
            p = rng.dirichlet(np.full(num_partitions, alpha)) * has_room
            if not p.sum() > 0:  # all of p lies on clients that are full
                p[rng.choice(np.flatnonzero(has_room))] = 1.0
            reached = np.cumsum(p)
            stops = np.floor(reached / reached[-1] * count).astype(np.int64)
            of_class[:] = np.diff(stops, prepend=0)
            sizes += of_class
        if sizes.min() >= smallest:
            break
    else:
        raise InvalidInput(
            f"in {_NUM_DRAWS} draws some of {num_partitions} clients always had fewer than "
            f"{smallest} of the {len(labels)} examples; use a larger alpha or fewer "
            "partitions"
        )
    pieces = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), np.cumsum(of_class)[:-1])
        for label, of_class in zip(classes, dealt, strict=True)
    ]
    return [np.concatenate(own) for own in zip(*pieces, strict=True)]


def split_quantity(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
) -> list[Indices]:
    """Give the clients IID examples, but sizes in proportions ~ Dir(alpha).

    Li et al. 2022 (NIID-Bench), "Quantity Skew". The smaller alpha, the more unequal. Unlike
    theirs every client gets one example before the rest is divided, so that none is empty.
    """
    shuffled = rng.permutation(len(labels))
    proportions = rng.dirichlet(np.full(num_partitions, alpha))
    rest = len(labels) - num_partitions
    stops = np.floor(np.cumsum(proportions) * rest).astype(np.int64) + np.arange(
        1, num_partitions + 1
    )
    # The last cut is dropped: rounding in the cumulative sum may put it one short of the end.
    return np.split(shuffled, stops[:-1])


PARTITIONERS: Mapping[str, Partitioner] = MappingProxyType(
    {
        "iid": split_iid,
        "shards": split_shards,
        "classes": split_classes,
        "dirichlet": split_dirichlet,
        "class-dirichlet": split_class_dirichlet,
        "quantity": split_quantity,
    }
)


def validate_scheme(scheme: str, parameters: Mapping[str, float]) -> dict[str, float]:
    """Return a scheme's `parameters` with those that count things as int.

    Raises:
        InvalidInput: unknown scheme, or a parameter out of range or not of this scheme.
    """
    split = PARTITIONERS.get(scheme)
    if split is None:
        raise InvalidInput(
            f"there is no partition scheme {scheme!r}; there are: {', '.join(PARTITIONERS)}"
        )
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(split).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    checked: dict[str, float] = {}
    for name, value in parameters.items():
        if name not in defaults:
            raise InvalidInput(
                f"the partition scheme {scheme!r} has no parameter {name!r} (given: {value}); its "
                f"parameters are: {', '.join(defaults) or 'none'}"
            )
        if not (math.isfinite(value) and value > 0):
            raise InvalidInput(f"{name} must be a positive number, but is {value}")
        counts = isinstance(defaults[name], int)
        if counts and value != int(value):
            raise InvalidInput(f"{name} must be a whole number, but is {value}")
        checked[name] = int(value) if counts else value
    return checked


def _even_sizes(num_examples: int, num_partitions: int) -> list[int]:
    small, num_larger = divmod(num_examples, num_partitions)
    return [small + (index < num_larger) for index in range(num_partitions)]

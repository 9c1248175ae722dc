"""Every scheme is a true partition, the same everywhere, and as skewed as its paper says."""

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedrounds.data.partitioners import PARTITIONERS, Labels, partition_indices
from fedrounds.errors import InvalidInput


def balanced_labels(num_per_class: int = 100, num_classes: int = 10) -> Labels:
    """Return shuffled labels with as many of each class."""
    labels = np.repeat(np.arange(num_classes), num_per_class)
    return np.random.default_rng(0).permutation(labels)


def class_shares(labels: Labels, share: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the proportions of the ten classes in a share."""
    return np.bincount(labels[share], minlength=10) / len(share)


def distance_to_uniform(labels: Labels, shares: list[NDArray[np.int64]]) -> float:
    """Return the mean total variation distance of the shares' classes to one tenth each."""
    return float(np.mean([abs(class_shares(labels, share) - 0.1).sum() / 2 for share in shares]))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Labels, dict[str, Any]]:
    """Draw labels, perhaps with gaps and rare classes, and a cut that may be possible."""
    labels = draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=120))
    scheme = draw(st.sampled_from(sorted(PARTITIONERS)))
    counts, alphas = st.integers(1, 5), st.floats(1e-3, 1e3)
    own: dict[str, tuple[str, st.SearchStrategy[float]]] = {
        "shards": ("shards_per_client", counts),
        "classes": ("classes_per_client", counts),
        "dirichlet": ("alpha", alphas),
        "class-dirichlet": ("alpha", alphas),
        "quantity": ("alpha", alphas),
    }
    parameters = {}
    if scheme in own and draw(st.booleans()):
        name, values = own[scheme]
        parameters[name] = draw(values)
    arguments = {
        "scheme": scheme,
        "num_partitions": draw(st.integers(1, 30)),
        "seed": draw(st.integers(0, 2**63)),
        "parameters": parameters,
    }
    return np.array(labels, np.int64), arguments


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_a_cut_is_a_true_partition_or_says_why_not(cut: tuple[Labels, dict[str, Any]]) -> None:
    """Every index exactly once, sorted, none empty, and the second cut equals the first."""
    labels, arguments = cut
    try:
        shares = partition_indices(labels, **arguments)
    except InvalidInput as error:
        assert "use " in str(error) or "classes" in str(error)  # noqa: PT017  both ends are fine
        return
    assert len(shares) == arguments["num_partitions"]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))
    for share, again in zip(shares, partition_indices(labels, **arguments), strict=True):
        assert share.dtype == np.int64
        assert share.size > 0
        assert (np.diff(share) > 0).all()
        assert share.tolist() == again.tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=30, max_size=120),
    st.integers(1, 30),
    st.integers(0, 1000),
    st.floats(1e-3, 1e6),
)
def test_schemes_that_need_no_luck_always_succeed(
    labels: list[int], num_partitions: int, seed: int, alpha: float
) -> None:
    """With an example for each client, neither iid, dirichlet nor quantity leaves one empty."""
    for scheme, parameters in (("iid", {}), ("dirichlet", {"alpha": alpha})):
        shares = partition_indices(
            np.array(labels),
            scheme=scheme,
            num_partitions=num_partitions,
            seed=seed,
            parameters=parameters,
        )
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1, scheme
    partition_indices(
        np.array(labels),
        scheme="quantity",
        num_partitions=num_partitions,
        seed=seed,
        parameters={"alpha": alpha},
    )


@pytest.mark.parametrize("scheme", sorted(PARTITIONERS))
def test_another_seed_and_another_number_give_another_cut(scheme: str) -> None:
    labels = balanced_labels()

    def first(num_partitions: int, seed: int) -> bytes:
        cut = partition_indices(labels, scheme=scheme, num_partitions=num_partitions, seed=seed)
        return cut[0].tobytes()

    assert first(10, 1) != first(10, 2)
    assert first(10, 1) != first(11, 1)


def test_iid_shares_have_the_classes_of_the_whole() -> None:
    """For 10,000 per share the standard deviation of a class's share is 0.003."""
    labels = balanced_labels(num_per_class=10_000)
    for share in partition_indices(labels, scheme="iid", num_partitions=10, seed=3):
        assert abs(class_shares(labels, share) - 0.1).max() < 0.015


def test_two_shards_a_client_mean_two_classes_at_most() -> None:
    """With 20 shards of 50 and 100 of each class no shard crosses classes."""
    labels = balanced_labels()
    shares = partition_indices(labels, scheme="shards", num_partitions=10, seed=3)
    assert all(len(np.unique(labels[share])) <= 2 for share in shares)
    assert all(len(share) == 100 for share in shares)


def test_shards_are_runs_of_the_labels_in_order() -> None:
    """One shard a client of sorted labels is, in some order, the array cut in pieces."""
    labels = np.repeat(np.arange(4), 5)
    shares = partition_indices(
        labels, scheme="shards", num_partitions=5, seed=0, parameters={"shards_per_client": 1}
    )
    runs = sorted(share.tolist() for share in shares)
    assert runs == [list(range(start, start + 4)) for start in (0, 4, 8, 12, 16)]


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_classes_gives_each_client_exactly_k_classes(k: int) -> None:
    """Each class is shared evenly by its owners, whose number is 10 k / 10 = k for all."""
    labels = balanced_labels(num_per_class=60)
    shares = partition_indices(
        labels, scheme="classes", num_partitions=10, seed=3, parameters={"classes_per_client": k}
    )
    for share in shares:
        counts = np.bincount(labels[share], minlength=10)
        assert np.count_nonzero(counts) == k
        assert set(counts[counts > 0]) == {60 // k}


def test_dirichlet_goes_from_one_class_to_iid_with_alpha() -> None:
    """Total variation distance to uniform: 0.9 for one class of ten, 0 for equal shares.

    In between: q_c ~ Beta(alpha/10, 9 alpha/10) for a class, so the expected distance is
    10/2 E|q_c - 0.1|; for alpha = 10, Beta(1, 9) gives 5 * 2 * 0.1 * 0.9^9 = 0.387.
    """
    labels = balanced_labels(num_per_class=4000)

    def distance(alpha: float) -> float:
        cut = partition_indices(
            labels, scheme="dirichlet", num_partitions=40, seed=5, parameters={"alpha": alpha}
        )
        return distance_to_uniform(labels, cut)

    assert distance(0.01) > 0.8
    assert distance(10) == pytest.approx(0.387, abs=0.04)
    assert distance(1e5) < 0.05


def test_class_dirichlet_deals_a_class_out_by_the_papers_law() -> None:
    """A part of a class is Beta(alpha, (N - 1) alpha): variance (1/N)(1 - 1/N) / (N alpha + 1).

    That holds for the first class: of later classes nothing goes to a client with its even share.
    """
    labels, num_clients = balanced_labels(num_per_class=10_000), 100
    for alpha in (0.5, 5.0):
        shares = partition_indices(
            labels,
            scheme="class-dirichlet",
            num_partitions=num_clients,
            seed=1,
            parameters={"alpha": alpha},
        )
        dealt = np.stack([np.bincount(labels[share], minlength=10) for share in shares])
        expected = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
        assert (dealt[:, 0] / 10_000).var() == pytest.approx(expected, rel=0.5)
        before = dealt.cumsum(axis=1) - dealt
        assert (dealt[before >= len(labels) / num_clients] == 0).all()
        assert dealt.sum(axis=1).min() >= 10


def test_class_dirichlet_says_when_luck_is_not_enough() -> None:
    with pytest.raises(InvalidInput, match="fewer than 10 of the 1000 examples"):
        partition_indices(
            balanced_labels(num_per_class=100),
            scheme="class-dirichlet",
            num_partitions=90,
            seed=1,
            parameters={"alpha": 1e-3},
        )


def test_quantity_skews_sizes_and_not_classes() -> None:
    """A share of Dir(alpha) over N has the variance (1/N)(1 - 1/N) / (N alpha + 1)."""
    labels = balanced_labels(num_per_class=10_000)
    for alpha in (0.5, 5.0):
        shares = partition_indices(
            labels, scheme="quantity", num_partitions=200, seed=1, parameters={"alpha": alpha}
        )
        proportions = np.array([len(share) for share in shares]) / len(labels)
        expected = (1 / 200) * (1 - 1 / 200) / (200 * alpha + 1)
        assert proportions.var() == pytest.approx(expected, rel=0.4)
    largest = max(shares, key=len)
    # 3.5 standard deviations of a class's share among n examples
    assert abs(class_shares(labels, largest) - 0.1).max() < 3.5 * (0.09 / len(largest)) ** 0.5


def test_cuts_are_pinned() -> None:
    """Clients cut without talking: another numpy that cuts differently must be noticed."""
    labels = balanced_labels()
    seen = {}
    for scheme in PARTITIONERS:
        cut = partition_indices(labels, scheme=scheme, num_partitions=10, seed=42)
        bounds = np.cumsum([len(share) for share in cut])
        content = np.concatenate([*cut, bounds]).astype("<i8").tobytes()
        seen[scheme] = hashlib.sha256(content).hexdigest()[:16]
    assert seen == {
        "iid": "7b7879504637fe00",
        "shards": "0204546c8a39c8f3",
        "classes": "5d48ea24b69f1bb1",
        "class-dirichlet": "39cbcbd70d6dba85",
        "dirichlet": "b3da03521d365750",
        "quantity": "e7001eed07a5ca50",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"scheme": "non-iid"},
            "there are: iid, shards, classes, dirichlet, class-dirichlet, quantity",
        ),
        ({"scheme": "iid", "parameters": {"alpha": 1.0}}, "its parameters are: none"),
        ({"scheme": "dirichlet", "parameters": {"beta": 1.0}}, "its parameters are: alpha"),
        ({"scheme": "dirichlet", "parameters": {"alpha": 0.0}}, "must be a positive number"),
        ({"scheme": "quantity", "parameters": {"alpha": float("nan")}}, "positive number"),
        ({"scheme": "shards", "parameters": {"shards_per_client": 1.5}}, "a whole number"),
        (
            {"scheme": "shards", "parameters": {"shards_per_client": 1e9}},
            "10 partitions of shards_per_client=1000000000 are more shards than the 1000 examples",
        ),
        ({"scheme": "shards", "parameters": {"shards_per_client": 101}}, "fewer shards a client"),
        ({"scheme": "classes", "parameters": {"classes_per_client": 11}}, "has 10 classes"),
        ({"scheme": "classes", "num_partitions": 4}, "can't hold all 10 classes"),
        ({"num_partitions": 0}, "at least 1"),
        ({"num_partitions": 1001}, "use at most 1000 partitions"),
        ({"seed": -1}, "can't be negative, but is -1"),
    ],
)
def test_an_impossible_cut_says_what_to_do(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        partition_indices(balanced_labels(), **{"num_partitions": 10, "seed": 0} | arguments)


def test_a_share_that_would_be_empty_is_named() -> None:
    """Ten owners of a class with two examples: eight of them get nothing."""
    labels = np.array([0, 0] + [1] * 20)
    with pytest.raises(InvalidInput, match=r"partition \d+ of 20 would be empty.*fewer partitions"):
        partition_indices(
            labels,
            scheme="classes",
            num_partitions=20,
            seed=0,
            parameters={"classes_per_client": 1},
        )

"""The norm band: who is the odd one, and that a cohort that belongs together loses nobody."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver.aggregation import screen
from fedserver.records import StoredUpdate
from fedserver.screening import MIN_COHORT, norm_band
from tests.factories import make_round, make_update


@given(
    norms=st.lists(st.floats(0, 1e6, width=32), min_size=MIN_COHORT, max_size=30),
    width=st.floats(0.5, 20),
)
def test_the_band_is_median_and_deviation(norms: list[float], width: float) -> None:
    """Against NumPy's median; at most half the cohort can lie outside."""
    band = norm_band(norms, width=width)
    values = np.array(norms)
    median = np.median(values)
    if band is None:
        assert median == 0
        return
    mad = np.median(np.abs(values - median))
    reach = width * max(1.4826 * mad, median / 10)
    assert band.median == pytest.approx(median)
    assert band.mad == pytest.approx(mad)
    assert band.high == pytest.approx(median + reach)
    assert band.low == pytest.approx(max(0, median - reach))
    if width >= 1:
        outside = [norm for norm in norms if not band.low <= norm <= band.high]
        assert 2 * len(outside) <= len(norms)


def test_too_small_a_cohort_has_no_band() -> None:
    """Of three nobody can say which is the odd one."""
    assert norm_band([1.0, 1.0, 100.0], width=1) is None


def stored(norms: list[float]) -> list[StoredUpdate]:
    """Return updates of clients 0, 1, ... with these norms."""
    return [
        StoredUpdate(client_id=number, update=make_update(f"o{number}"), delta_norm=norm)
        for number, norm in enumerate(norms)
    ]


def test_the_odd_one_is_excluded_with_the_numbers_that_show_it() -> None:
    """Norm, median, deviation and band are the evidence, in the sentence and as numbers."""
    closed = make_round(clients=range(5))
    (found,) = screen(closed, stored([1.0, 1.1, 0.9, 1.0, 30.0]), width=10, trusted=())
    assert found.client_id == 4
    evidence = found.refusal.evidence
    assert evidence["kind"] == "norm-band"
    assert (evidence["norm"], evidence["median"]) == (30.0, 1.0)
    assert evidence["mad"] == pytest.approx(0.1)
    assert evidence["high"] == pytest.approx(1 + 10 * 1.4826 * 0.1)
    for shown in ("30 away", "median 1", "0 to 2.4826"):
        assert shown in found.refusal.reason
    assert found.happened.is_incident


@pytest.mark.parametrize(("width", "trusted"), [(0, ()), (10, (4,))])
def test_nobody_is_excluded_who_is_trusted_or_where_it_is_off(
    width: float, trusted: tuple[int, ...]
) -> None:
    """A width of 0 means no band; a released client is not screened any more."""
    closed = make_round(clients=range(5))
    norms = [1.0, 1.1, 0.9, 1.0, 30.0]
    assert screen(closed, stored(norms), width=width, trusted=trusted) == []

"""Who is late: a function of values, examined without a server."""

from dataclasses import replace

import pytest

from fedrounds.types import ClientAlgorithmConfig, Section, TrainingConfig
from fedserver.rounds.stalls import (
    Lateness,
    Patience,
    Progress,
    Work,
    find_lateness,
    find_loss,
    total_bound_s,
    work_of,
)
from tests.factories import make_order

PATIENCE = Patience(silence_s=60, first_step_s=600, examples_per_s=0.1, bytes_per_s=10_000)
WORK = Work(num_examples=600, num_bytes=3_000_000)
BOUND_S = 600 + 600 / 0.1 + 3_000_000 / 10_000


def lateness(
    *,
    silent_s: float = 0,
    idle_s: float = 0,
    total_s: float = 0,
    longest_step_s: float | None = None,
    work: Work = WORK,
) -> Lateness | None:
    """Return why a client with this progress is late."""
    progress = Progress(
        silent_s=silent_s, idle_s=idle_s, total_s=total_s, longest_step_s=longest_step_s
    )
    return find_lateness(progress, work, PATIENCE)


def test_a_client_nobody_hears_of_is_late() -> None:
    """Whatever its steps took so far: one that works reports every second."""
    assert lateness(silent_s=60, idle_s=60, longest_step_s=300) is None
    assert lateness(silent_s=60.1, idle_s=60.1, longest_step_s=300) is Lateness.SILENT


def test_a_first_step_has_the_time_of_its_setting() -> None:
    """A batch longer than the silence allowed isn't late while its client is heard of."""
    assert lateness(silent_s=1, idle_s=600) is None
    assert lateness(silent_s=1, idle_s=600.1) is Lateness.NO_PROGRESS


@pytest.mark.parametrize(
    ("longest_step_s", "bound_s"),
    [
        # Quick steps: a pause as long as a silence is nothing unusual.
        (0.01, 60),
        (6, 60),
        # Long ones: ten times the longest.
        (7, 70),
        (300, 3000),
    ],
)
def test_a_step_has_ten_times_the_longest_so_far(longest_step_s: float, bound_s: float) -> None:
    """A client is compared with itself alone."""
    assert lateness(idle_s=bound_s, longest_step_s=longest_step_s) is None
    late = lateness(idle_s=bound_s + 0.1, longest_step_s=longest_step_s)
    assert late is Lateness.NO_PROGRESS


def test_whoever_makes_tiny_progress_for_ever_is_late_in_the_end() -> None:
    """The time of all examples and bytes at the slowest rates, and of a first step, is all."""
    assert total_bound_s(WORK, PATIENCE) == BOUND_S
    assert lateness(idle_s=1, total_s=BOUND_S, longest_step_s=2) is None
    assert lateness(idle_s=1, total_s=BOUND_S + 0.1, longest_step_s=2) is Lateness.TOO_LONG


def test_a_site_with_a_hundred_times_the_data_has_a_hundred_times_the_time() -> None:
    """At the same pace both are in time, or neither is."""
    large = Work(num_examples=100 * WORK.num_examples, num_bytes=WORK.num_bytes)
    at_own_pace_s = 100 * 600 / 0.2
    assert lateness(idle_s=1, total_s=at_own_pace_s, longest_step_s=2, work=large) is None
    assert lateness(idle_s=1, total_s=at_own_pace_s, longest_step_s=2) is Lateness.TOO_LONG


def test_an_order_nobody_pulls_is_lost_however_alive_its_session_is() -> None:
    """With the session's lease, or when its client could have pulled it for long enough."""

    def loss(*, is_session_live: bool, waiting_s: float) -> Lateness | None:
        return find_loss(is_session_live=is_session_live, waiting_s=waiting_s, patience=PATIENCE)

    assert loss(is_session_live=True, waiting_s=600) is None
    assert loss(is_session_live=True, waiting_s=600.1) is Lateness.NEVER_PULLED
    assert loss(is_session_live=False, waiting_s=1) is Lateness.GONE


def test_what_an_order_asks_for() -> None:
    """Epochs, evaluations and transfers of a client with ten examples."""
    order = make_order()
    plain = TrainingConfig(epochs=3, batch_size=1024)
    sections = (Section(name="model", digest="d", size_bytes=500),)

    def work(*, evaluate: bool = False, training: TrainingConfig = plain) -> Work:
        asked = replace(order, training=training, sections=sections, evaluate=evaluate)
        return work_of(asked, num_examples=10)

    assert work() == Work(num_examples=30, num_bytes=1500)
    # It evaluates 256 examples at a time first: a step of training may take four times as long.
    assert work(evaluate=True) == Work(num_examples=40, num_bytes=1500, step_ratio=4)
    # Under Ditto another model is trained and evaluated beside the global one.
    ditto = replace(plain, client_algorithm=ClientAlgorithmConfig(name="ditto"))
    assert work(evaluate=True, training=ditto).num_examples == 80

"""Who holds a client id: the same instance at once, another instance when the lease is over."""

import pytest

from fedrounds.errors import ClientIdTaken, InvalidInput, StateDirCopied, UnknownSession
from fedrounds.types import Registration
from fedserver.clients.sessions import Sessions
from tests.factories import make_registration, make_session

LEASE_S = 30.0
MAX_NUM_EXAMPLES = 1000


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    """Give a server's sessions, none yet."""
    return Sessions([], lease_s=LEASE_S, max_num_examples=MAX_NUM_EXAMPLES, clock=clock)


def test_the_same_instance_takes_its_session_over_at_once(sessions: Sessions) -> None:
    """A client that crashed and came back keeps its session, and what it declared of its data."""
    first, _ = sessions.register(make_registration(4, num_examples=(7,)))
    again, replaced = sessions.register(make_registration(4))
    assert (again.session_id, again.num_examples, replaced) == (first.session_id, (7,), [])
    newer, _ = sessions.register(make_registration(4, num_examples=(9,)))
    assert (newer.session_id, newer.num_examples) == (first.session_id, (9,))
    assert sessions.touch(first.session_id).num_examples == (9,)


def test_another_instance_waits_until_the_lease_is_over(sessions: Sessions, clock: Clock) -> None:
    """Two processes can't be one client: the second is refused, with a way out in the message."""
    first, _ = sessions.register(make_registration(4, instance_key="one"))
    clock.now += LEASE_S - 0.001
    with pytest.raises(ClientIdTaken, match=r"client id 4 is in use.*--id.*30 s"):
        sessions.register(make_registration(4, instance_key="two"))
    assert sessions.touch(first.session_id) == first
    clock.now += LEASE_S
    second, replaced = sessions.register(make_registration(4, instance_key="two"))
    assert replaced == [first.session_id]
    with pytest.raises(UnknownSession, match="register again"):
        sessions.touch(first.session_id)
    assert sessions.touch(second.session_id) == second


def test_every_call_renews_the_lease(sessions: Sessions, clock: Clock) -> None:
    """A client that goes on calling never loses its id."""
    first, _ = sessions.register(make_registration(4, instance_key="one"))
    for _ in range(5):
        clock.now += LEASE_S - 1
        sessions.touch(first.session_id)
    with pytest.raises(ClientIdTaken):
        sessions.register(make_registration(4, instance_key="two"))


def test_an_instance_with_other_ids_replaces_its_old_sessions(sessions: Sessions) -> None:
    """One process that now serves two ids ends the sessions that served them one by one."""
    first, _ = sessions.register(make_registration(1))
    second, _ = sessions.register(make_registration(2))
    both, replaced = sessions.register(make_registration(1, 2))
    assert sorted(replaced) == sorted([first.session_id, second.session_id])
    assert both.session_id not in replaced
    for old in (first, second):
        with pytest.raises(UnknownSession):
            sessions.touch(old.session_id)
    assert sessions.has_live_holder(1)
    assert sessions.has_live_holder(2)


def test_a_refused_registration_changes_nothing(sessions: Sessions) -> None:
    """One id taken of two asked for: neither the holder's nor the asker's session is touched."""
    mine, _ = sessions.register(make_registration(1, instance_key="mine"))
    other, _ = sessions.register(make_registration(2, instance_key="other"))
    with pytest.raises(ClientIdTaken, match="client id 2 "):
        sessions.register(make_registration(1, 2, instance_key="mine"))
    assert sessions.touch(mine.session_id) == mine
    assert sessions.touch(other.session_id) == other


def test_after_a_restart_everybody_has_a_whole_lease(clock: Clock) -> None:
    """Sessions from the store are live from the server's start on, by the server's own clock."""
    known = make_session(3, session_id="old", instance_key="one")
    sessions = Sessions([known], lease_s=LEASE_S, max_num_examples=MAX_NUM_EXAMPLES, clock=clock)
    assert sessions.touch("old") == known
    clock.now += LEASE_S - 1
    assert sessions.has_live_holder(3)
    assert sessions.live_sessions() == {"old"}
    clock.now += 2
    assert not sessions.has_live_holder(3)
    assert sessions.live_sessions() == set()


def test_only_clients_that_declared_their_data_are_ready(sessions: Sessions, clock: Clock) -> None:
    """A client is a candidate when it knows its data; a lease that ended matters if asked."""
    sessions.register(make_registration(1))
    assert sessions.ready_clients(only_live=True) == set()
    sessions.register(make_registration(1, num_examples=(5,)))
    sessions.register(make_registration(2, 3, instance_key="two", num_examples=(5, 6)))
    assert sessions.ready_clients(only_live=True) == {1, 2, 3}
    clock.now += LEASE_S
    assert sessions.ready_clients(only_live=True) == set()
    assert sessions.ready_clients(only_live=False) == {1, 2, 3}


@pytest.mark.parametrize(
    ("registration", "words"),
    [
        (make_registration(3, 1, 1), "client id 1 is given twice"),
        (make_registration(1, 2, num_examples=(5,)), "1 data sizes for 2 client ids"),
        (make_registration(1, 2, num_examples=(5, 0)), "client 2 has 0 examples"),
        (
            make_registration(1, 2, num_examples=(5, 1001)),
            "client 2 has 1001 examples; .* 1 to 1000",
        ),
    ],
)
def test_a_malformed_registration_is_refused(
    sessions: Sessions, registration: Registration, words: str
) -> None:
    """The message says what is wrong, and nobody is registered."""
    with pytest.raises(InvalidInput, match=words):
        sessions.register(registration)
    assert sessions.live_sessions() == set()


def test_a_client_that_leaves_is_in_no_session(sessions: Sessions) -> None:
    """The others of its process stay, with their data sizes; with the last the session ends."""
    session, _ = sessions.register(make_registration(1, 2, num_examples=(5, 6)))
    (changed,), ended = sessions.leave([1])
    assert (changed.client_ids, changed.num_examples, ended) == ((2,), (6,), [])
    assert sessions.touch(session.session_id) == changed
    assert sessions.ready_clients(only_live=False) == {2}
    assert dict(sessions.data_sizes()) == {2: 6}
    assert sessions.holder_of(1) is None
    assert sessions.leave([1, 2]) == ([], [session.session_id])
    with pytest.raises(UnknownSession):
        sessions.touch(session.session_id)


def test_a_client_that_is_expected_back_keeps_its_place(sessions: Sessions, clock: Clock) -> None:
    """It isn't there until it registers, and any process may take its place at once."""
    session, _ = sessions.register(make_registration(1, instance_key="one", num_examples=(5,)))
    assert sessions.leave([1], expected=[1]) == ([], [])
    clock.now += 4
    assert sessions.away_s(1) == 4
    assert sessions.ready_clients(only_live=True) == set()
    assert sessions.ready_clients(only_live=False) == {1}
    assert not sessions.has_live_holder(1)
    assert sessions.live_sessions() == set()
    with pytest.raises(UnknownSession):
        sessions.touch(session.session_id)
    again, _ = sessions.register(make_registration(1, instance_key="one"))
    assert (again.session_id, again.num_examples) == (session.session_id, (5,))
    assert sessions.away_s(1) is None
    sessions.leave([1], expected=[1])
    _, replaced = sessions.register(make_registration(1, instance_key="two"))
    assert replaced == [session.session_id]
    assert sessions.has_live_holder(1)


def test_one_of_many_expected_back_leaves_the_others_their_session(sessions: Sessions) -> None:
    """Calls for the others go on; a second goodbye removes the client that was expected back."""
    session, _ = sessions.register(make_registration(1, 2, 3, num_examples=(5, 6, 7)))
    sessions.leave([1, 2], expected=[2])
    assert sessions.touch(session.session_id).client_ids == (2, 3)
    assert sessions.ready_clients(only_live=True) == {3}
    assert sessions.away_s(2) == 0
    sessions.leave([2])
    assert sessions.away_s(2) is None
    assert sessions.touch(session.session_id).client_ids == (3,)


def register_process(sessions: Sessions, key: str, *, size: int = 5) -> str:
    """Register client 1 from a process; returns its session's id."""
    registration = make_registration(1, num_examples=(size,), process_key=key)
    return sessions.register(registration)[0].session_id


def test_a_restarted_process_takes_over_at_once_and_the_old_process_learns_it(
    sessions: Sessions,
) -> None:
    """However often: each has a session of its own, and what it said before stays known."""
    old = register_process(sessions, "0")
    assert register_process(sessions, "0") == old
    for number in range(1, 100):
        restarted = make_registration(1, process_key=str(number))
        session, replaced = sessions.register(restarted)
        assert (replaced, session.num_examples) == ([old], (5,))
        assert sessions.has_live_holder(1)
        with pytest.raises(UnknownSession):
            sessions.touch(old)
        old = session.session_id


def test_processes_that_overlap_for_a_while_arent_refused(sessions: Sessions) -> None:
    """Each may come back once: the older of them ends, or a call was long on its way."""
    for key in ("one", "two", "one", "two", "three"):
        session_id = register_process(sessions, key)
        assert sessions.touch(session_id).client_ids == (1,)


@pytest.mark.parametrize("num_copies", [2, 3, 5])
def test_processes_with_copies_of_a_state_dir_are_all_refused(
    num_copies: int, sessions: Sessions
) -> None:
    """Nobody has the session then, until a new process comes; the copies stay refused."""
    copies = [str(number) for number in range(num_copies)]
    for key in copies * 2:
        session_id = register_process(sessions, key)
    for key in copies * 2:
        with pytest.raises(StateDirCopied, match="copy of the state-dir of client id 1 "):
            register_process(sessions, key)
        assert not sessions.has_live_holder(1)
    with pytest.raises(UnknownSession):
        sessions.touch(session_id)
    repaired = register_process(sessions, "new")
    for key in copies:
        with pytest.raises(StateDirCopied):
            register_process(sessions, key)
    assert sessions.touch(repaired).client_ids == (1,)


def test_a_process_that_is_gone_for_a_lease_is_no_copy_in_use(
    sessions: Sessions, clock: Clock
) -> None:
    """Whoever is there alone goes on."""
    for key in ("one", "two") * 2:
        register_process(sessions, key)
    clock.now += LEASE_S
    assert sessions.touch(register_process(sessions, "one")).client_ids == (1,)


def test_a_client_without_a_process_key_keeps_its_session(sessions: Sessions) -> None:
    """As in versions before that key, whoever had the session in between."""
    session_id = register_process(sessions, "")
    assert register_process(sessions, "") == session_id
    for _ in range(9):
        register_process(sessions, "one")
        assert register_process(sessions, "") == register_process(sessions, "")


def test_a_lease_ends_at_its_end(sessions: Sessions, clock: Clock) -> None:
    """Not before, and a client that leaves a session renews nothing for the others."""
    session, _ = sessions.register(make_registration(1, 2, num_examples=(5, 5)))
    clock.now += LEASE_S - 1
    sessions.leave([2])
    assert sessions.has_live_holder(1)
    assert sessions.silent_s(1) == LEASE_S - 1
    clock.now += 1
    assert not sessions.has_live_holder(1)
    sessions.touch(session.session_id)
    assert sessions.has_live_holder(1)


@pytest.mark.parametrize(("size", "is_taken"), [(0, False), (1, True), (1000, True), (1001, False)])
def test_a_client_has_at_least_one_example_and_no_more_than_the_run_takes(
    sessions: Sessions, size: int, is_taken: bool
) -> None:
    """Both bounds are within."""
    if is_taken:
        sessions.register(make_registration(1, num_examples=(size,)))
        assert sessions.num_examples_of(1) == size
    else:
        with pytest.raises(InvalidInput, match=f"client 1 has {size} examples"):
            sessions.register(make_registration(1, num_examples=(size,)))

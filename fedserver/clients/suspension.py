"""Which clients a round may ask: those that gave cause sit out some rounds, then come back.

The first strike costs one whole round, each further one twice as many as the one before, and an
update that counts clears them all. An update that was excluded is no strike: it was compared with
others, which proves nothing against its client, so it costs one round, however often.
"""

from collections.abc import Collection, Mapping

from fedserver.records import Standing

MAX_SPAN = 64
"""Rounds that a client sits out at most."""


def strike(before: Standing | None, *, client_id: int, round_number: int, reason: str) -> Standing:
    """Return the standing of a client that gave cause in a round."""
    strikes = 1 if before is None else before.strikes + 1
    return Standing(
        client_id=client_id,
        strikes=strikes,
        suspended_until=round_number + 1 + min(MAX_SPAN, 2 ** min(strikes - 1, MAX_SPAN)),
        reason=reason,
    )


def pause(before: Standing | None, *, client_id: int, round_number: int, reason: str) -> Standing:
    """Return the standing of a client whose update was excluded in a round."""
    return Standing(
        client_id=client_id,
        strikes=0 if before is None else before.strikes,
        suspended_until=round_number + 2,
        reason=reason,
    )


def eligible_clients(
    candidates: Collection[int],
    standings: Mapping[int, Standing],
    *,
    round_number: int,
    num_needed: int,
) -> set[int]:
    """Return the candidates that aren't suspended in this round.

    Where they are fewer than `num_needed`, suspended ones are called back, those whose suspension
    ends first before the others: a run must not wait for rounds that can't come.
    """

    def suspended_until(client_id: int) -> int:
        standing = standings.get(client_id)
        return 0 if standing is None else standing.suspended_until

    active = {one for one in candidates if suspended_until(one) <= round_number}
    waiting = sorted(set(candidates) - active, key=lambda one: (suspended_until(one), one))
    return active | set(waiting[: max(0, num_needed - len(active))])

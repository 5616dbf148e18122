"""What was seen, taken as evidence: where the later turns went, and whether the key did it."""

from dataclasses import dataclass
from math import exp, lgamma

from .facts import KEY_BRANCHES
from .seen import Counters, Seen, Summary, by_session

_CHANCE = 0.001  # less likely than this to be chance counts as seen


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the keyed arm: the later turns ``kept`` and ``moved``, of ``later``."""

    kept: int
    moved: int
    later: int


def worker_count(seen: Seen) -> int | None:
    """Return how many workers there are as far as anyone tells, or None."""
    named = {turn.worker for turn in seen.turns if turn.worker}
    return max(seen.workers or 0, len(named)) or None


def from_workers(keyed: Summary) -> Evidence:
    """Return what the workers that the gateway named tell."""
    return Evidence(keyed.outcomes["kept"], keyed.outcomes["moved"], keyed.later)


def from_counters(seen: Seen, keyed: Summary) -> Evidence | None:
    """Return what the counters alone tell, or None where they don't.

    A keyed call that the key did not route counts as moved, and so does each pin beyond one for a
    session.
    """
    counters = _own_counters(seen)
    if counters is None:
        return None
    begun = len(by_session(seen.turns, "keyed"))
    ignored = max(0, keyed.answered - counters.of(*KEY_BRANCHES))
    repinned = max(0, counters.of("vacant") - begun)
    moved = ignored + repinned + counters.of("occupied_miss", "cap_respill")
    answered = keyed.answered - keyed.sessions
    moved = min(moved, answered)
    return Evidence(answered - moved, moved, keyed.later)


def key_was_used(seen: Seen, keyed: Summary) -> bool | None:
    """Tell by the counters whether the gateway routed on the key, or None where they don't tell."""
    counters = _own_counters(seen)
    if counters is None:
        return None
    used = counters.of(*KEY_BRANCHES)
    return None if 0 < used < keyed.answered else used > 0


def keys_shared(seen: Seen, keyed: Summary) -> bool:
    """Tell whether sessions must have had one key between them, by the pins or by the hash.

    Ids that another run may have had can be pinned from then: those tell nothing.
    """
    counters = _own_counters(seen)
    if counters is None or counters.of(*KEY_BRANCHES) < keyed.answered:
        return False
    if counters.of("routing_key_hit"):
        chance = (worker_count(seen) or 1) ** (1 - keyed.sessions)
        return len(keyed.workers) == 1 and chance < _CHANCE
    return "{run}" in seen.plan.session_id and counters.of("vacant") < keyed.sessions


def counts_any_call(seen: Seen) -> bool:
    """Tell whether calls without our key count as routed by a key as well."""
    unkeyed = sum(turn.arm == "unkeyed" for turn in seen.turns)
    counters = seen.counters
    if counters is None or counters.calls > seen.sent:
        return False
    return counters.of(*KEY_BRANCHES) > seen.sent - unkeyed


def key_parts_sessions(seen: Seen, keyed: Summary) -> bool:
    """Tell whether only the key can have put sessions on several workers.

    So it is where the gateway hashes something else without a key, the same in all our calls: it
    sends all those to one worker.
    """
    unkeyed = {turn.worker for turn in seen.turns if turn.arm == "unkeyed" and turn.worker}
    alike = counts_any_call(seen) and not seen.plan.through
    return alike and len(unkeyed) == 1 < len(keyed.workers)


def counts_no_key(counters: Counters) -> bool:
    """Tell whether the policy routes on a key, but counts it in no branch that is read here."""
    return "prefix_hash" in counters.selections and not counters.of(*KEY_BRANCHES)


def _own_counters(seen: Seen) -> Counters | None:
    """Return the counters if they are of our calls, of all and of no others, and tell the key."""
    counters = seen.counters
    answered = sum(turn.outcome != "failed" for turn in seen.turns)
    if counters is None or not answered <= counters.calls <= seen.sent:
        return None
    return None if counts_any_call(seen) or counts_no_key(counters) else counters


def more_than_chance(keyed: Summary, unkeyed: Summary) -> bool:
    """Tell whether the keyed arm kept more than the other one, beyond what chance does.

    Fisher's exact test, one-sided: how likely is so good a keyed arm if the key did nothing?
    """
    kept, moved = keyed.outcomes["kept"], keyed.outcomes["moved"]
    other_kept, other_moved = unkeyed.outcomes["kept"], unkeyed.outcomes["moved"]
    mine, all_kept = kept + moved, kept + other_kept
    total = mine + other_kept + other_moved

    def ways(of: int, taken: int) -> float:
        return lgamma(of + 1) - lgamma(taken + 1) - lgamma(of - taken + 1)

    likelihood = sum(
        exp(ways(mine, more) + ways(total - mine, all_kept - more) - ways(total, all_kept))
        for more in range(kept, min(mine, all_kept) + 1)
    )
    return likelihood < _CHANCE

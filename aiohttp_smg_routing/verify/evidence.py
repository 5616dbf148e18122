"""What was seen, taken as evidence: where the later turns went, and whether the key did it."""

from dataclasses import dataclass
from math import exp, lgamma

from ..gateway import KEY_BRANCHES
from .seen import Seen, Summary

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
    session. None where calls of others are in the counters, or some of ours are not.
    """
    counters = seen.counters
    answered = sum(turn.outcome != "failed" for turn in seen.turns)
    if counters is None or not answered <= counters.calls <= seen.sent:
        return None
    ignored = max(0, keyed.answered - counters.of(*KEY_BRANCHES))
    repinned = max(0, counters.of("vacant") - keyed.sessions)
    moved = ignored + repinned + counters.of("occupied_miss", "cap_respill")
    later = keyed.answered - keyed.sessions
    moved = min(moved, later)
    return Evidence(later - moved, moved, later + keyed.outcomes["failed"])


def key_was_used(seen: Seen, keyed: Summary, unkeyed: Summary) -> bool | None:
    """Tell by the counters whether the gateway routed on the key, or None where they don't tell.

    Other people's calls may have keys of their own: with those in the counters, only a key that
    was never used is certain.
    """
    counters = seen.counters
    if counters is None or counters.calls < keyed.answered + unkeyed.answered:
        return None
    used = counters.of(*KEY_BRANCHES)
    if used == 0:
        return False
    return True if used >= keyed.answered and counters.calls <= seen.sent else None


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

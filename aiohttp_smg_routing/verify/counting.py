"""Reads the gateway's counters for each pool, which is a kind of worker."""

import re
from typing import Literal

from .chance import beyond_chance, more_than_chance
from .facts import CACHE_KEEPERS, KEY_BRANCHES, KEY_ONLY_POLICIES, PROBES, UNCOUNTED_POLICIES
from .seen import ARMS, Counters, Seen
from .summary import Summary, summarise

Use = Literal["used", "not used", "untold"]


def pools(seen: Seen) -> tuple[str, ...]:
    """Return the pools to judge: those that keep a cache and have several workers.

    Return nothing if neither the gateway's list of workers nor its counters name any.
    """
    if seen.workers is not None:
        keepers = [name for name in CACHE_KEEPERS if name in seen.workers]
        return tuple(name for name in keepers if seen.workers[name] != 1) or tuple(keepers)
    counted = seen.counters.pools if seen.counters else {}
    return tuple(name for name in CACHE_KEEPERS if name in counted)


def answering(names: tuple[str, ...]) -> str:
    """Return the pool of the worker that an answer names: "decode" if there is one."""
    return "decode" if "decode" in names else "regular"


def worker_count(seen: Seen) -> int | None:
    """Return the size of the largest pool as far as it is known, or None."""
    named = {turn.worker for turn in seen.turns if turn.worker}
    listed = [seen.workers.get(name, 0) for name in CACHE_KEEPERS] if seen.workers else [0]
    return max(*listed, len(named)) or None


def is_ours(seen: Seen) -> bool:
    """Tell whether the counters have all of our calls and no others."""
    answered = sum(turn.outcome != "failed" for turn in seen.turns)
    return seen.counters is not None and answered <= seen.counters.calls <= seen.sent


def knows_gateway(seen: Seen) -> bool:
    """Tell whether the metrics belong to the called gateway: the probe then shows in them."""
    return seen.probe is not None and seen.probe.calls > 0


def policy_of(counters: Counters, pool: str) -> str | None:
    """Return the policy of a pool; None if no policy chose a worker, or several did."""
    policies = [*counters.pools.get(pool, {})]
    return policies[0] if len(policies) == 1 else None


def series_of(counters: Counters, policy: str) -> str:
    """Return the policy that counts the calls with a key: ``manual`` under the override."""
    return policy if policy in counters.branches else "manual"


def _mates(counters: Counters, series: str) -> tuple[int, int]:
    """Return how many pools have the policy of a series, and how many others may count in it."""
    policies = [policy_of(counters, name) or "" for name in counters.pools if name in CACHE_KEEPERS]
    explicit = policies.count(series)
    return explicit, sum(series_of(counters, name) == series for name in policies) - explicit


def sharing(counters: Counters, pool: str) -> int:
    """Return how many pools count in the same series as this one, including it."""
    series = series_of(counters, policy_of(counters, pool) or "")
    explicit, others = _mates(counters, series)
    return explicit + (others if _total(counters, series) > explicit * counters.calls else 0)


def may_lose_workers(seen: Seen) -> bool:
    """Tell whether ``consistent_hashing`` of SMG before 1.12 chose all workers, of one kind."""
    counters, load = seen.counters or Counters(), seen.load
    if {*counters.pools} != {"regular"} or {*counters.branches} != {"consistent_hashing"}:
        return False
    is_hashed = policy_of(counters, "regular") == "consistent_hashing"
    return is_hashed and load.kind == "smg" and not load.can_protect


def keyed_calls(counters: Counters, pool: str) -> int:
    """Return in how many calls the key chose the pool's worker.

    Pools in one series share its count. It goes first to those whose policy has the series' name.
    """
    policy = policy_of(counters, pool) or ""
    series = series_of(counters, policy)
    explicit, others = _mates(counters, series)
    first = min(_total(counters, series), explicit * counters.calls)
    if policy == series:
        return first // explicit
    return (_total(counters, series) - first) // max(1, others)


def _total(counters: Counters, series: str) -> int:
    taken = counters.branches.get(series, {})
    return sum(taken.get(branch, 0) for branch in KEY_BRANCHES)


def key_use(seen: Seen, pool: str) -> Use:
    """Tell from the counters whether the key chose the pool's worker in all calls, or in none.

    Counters that also have calls of others, or lack some of ours, may be of another gateway. They
    don't outweigh the workers' names if those show the key at work.
    """
    use = _counted_use(seen, pool)
    if use == "not used" and not is_ours(seen) and _names_show_key(seen):
        return "untold"
    return use


def _names_show_key(seen: Seen) -> bool:
    keyed, control = (summarise(seen.turns, arm) for arm in ARMS)
    return more_than_chance(keyed, control)


def _counted_use(seen: Seen, pool: str) -> Use:
    counters = seen.counters
    if counters is None:
        return "untold"
    if counters.calls == 0:
        lost = seen.plan.through and knows_gateway(seen) and seen.turns
        return "not used" if lost else "untold"
    policy = policy_of(counters, pool)
    if policy is None or counts_any_call(seen, pool):
        return "untold"
    if policy in UNCOUNTED_POLICIES:
        return "not used" if one_for_all(seen) else "untold"
    used = keyed_calls(counters, pool)
    answered = sum(turn.outcome != "failed" for turn in seen.turns)
    if used == 0:
        named = {turn.worker for turn in seen.turns if turn.worker}
        if counters.workers and named - {*counters.workers}:
            return "untold"  # the metrics are of another gateway
        whole = seen.plan.through or counters.calls >= answered
        return "not used" if is_ours(seen) or (knows_gateway(seen) and whole) else "untold"
    all_used = is_ours(seen) and knows_gateway(seen) and used >= answered
    return "used" if all_used else "untold"


def keys_arrive(seen: Seen) -> bool:
    """Tell whether this gateway has seen keys, or its policy follows nothing but keys."""
    counters, names = seen.counters, pools(seen)
    if counters is None or not names or not (is_ours(seen) and knows_gateway(seen)):
        return False
    return all(
        policy_of(counters, pool) in KEY_ONLY_POLICIES or key_use(seen, pool) == "used"
        for pool in names
    )


def counts_any_call(seen: Seen, pool: str) -> bool:
    """Tell whether calls without a key count as routed by a key, as the probe shows.

    If others called the gateway meanwhile, their keys count in the probe, too. Then it shows
    nothing of a policy that hashes nothing but keys.
    """
    policy = policy_of(seen.counters or Counters(), pool)
    if seen.probe is None or policy is None:
        return False
    series = series_of(seen.counters or Counters(), policy)
    may_count_any = series in ("consistent_hashing", "prefix_hash")
    return (may_count_any or seen.probe.calls <= PROBES) and _total(seen.probe, series) > 0


def key_count(seen: Seen) -> int:
    """Return how many sessions, and so how many keys, have had an answer."""
    answered = (turn for turn in seen.turns if turn.outcome != "failed")
    return len({(t.arm, t.session, t.arm == "control" and t.number) for t in answered})


def one_for_all(seen: Seen) -> bool:
    """Tell whether one of several workers got all calls of all keys, beyond chance."""
    got = len(seen.counters.workers) if seen.counters else 0
    return got == 1 and beyond_chance(got, worker_count(seen) or 0, key_count(seen))


def is_stable(seen: Seen) -> bool:
    """Tell whether the same workers were there all the time."""
    troubles = seen.counters.troubles if seen.counters else 0
    return not (seen.load.overloaded or seen.has_changed or troubles)


def workers_reached(seen: Seen) -> int:
    """Return how many workers answered, by their names or the counters."""
    named = {turn.worker for turn in seen.turns if turn.worker}
    return len(named.union(seen.counters.workers if seen.counters else ()))


def keys_tell(seen: Seen) -> bool:
    """Tell whether all calls were ours, and each session's own key chose their worker.

    If a call without a key counts as one with a key, as with an API key, then several workers show
    it: all of our calls have the same API key.
    """
    if key_use(seen, "regular") == "used":
        return True
    several = workers_reached(seen) > 1 and counts_any_call(seen, "regular")
    return several and is_ours(seen) and seen.plan.through is None


def keys_shared(seen: Seen, keyed: Summary, control: Summary, pool: str) -> bool:
    """Tell from the pins or the hash whether sessions must have shared a key.

    Ids of an earlier run may still be pinned. Then only the ends of the ids show it.
    """
    counters = seen.counters
    if counters is None or key_use(seen, pool) != "used":
        return False
    keys = key_count(seen)
    series = series_of(counters, policy_of(counters, pool) or "")
    if series != "manual":
        workers = {*keyed.workers, *control.workers}
        return len(workers) == 1 and beyond_chance(1, worker_count(seen) or 0, keys)
    if fresh_ids(seen):
        return counters.branches[series].get("vacant", 0) < sharing(counters, pool) * keys
    stripped = {re.sub(r"_[tr][0-9]+$", "", name) for name in seen.plan.ids()}
    overridden = policy_of(counters, pool) != series
    return overridden and len(stripped) < len(seen.plan.ids())


def fresh_ids(seen: Seen) -> bool:
    """Tell whether no other run has had these session ids."""
    return "{run}" in seen.plan.session_id or seen.plan.create is not None


def kept_by_counters(
    seen: Seen, keyed: Summary, control: Summary, pool: str, *, own_keys: bool
) -> tuple[int, int]:
    """Return at least and at most how many later turns the key brought to their session's worker.

    ``own_keys`` says whether each session surely has a key of its own: the counters show that a key
    was used, never whose. If they show nothing, the bounds are none and all.
    """
    counters, later = seen.counters, keyed.later
    policy = policy_of(counters, pool) if counters else None
    if counters is None or policy is None or not is_ours(seen) or counts_any_call(seen, pool):
        return 0, later
    series, count = series_of(counters, policy), sharing(counters, pool)
    if not keyed_calls(counters, pool) or (series != "manual" and not is_stable(seen)):
        return 0, later  # a hash is counted even if the worker that it names is left out
    answered = keyed.answered - keyed.sessions
    failed = seen.sent - keyed.answered - control.answered + max(0, counters.troubles)
    if series == "manual":
        hits = counters.branches[series].get("occupied_hit", 0)
        least = hits - (count - 1) * answered - failed if fresh_ids(seen) else 0
        most = min(answered, hits // count)
    else:
        lost = max(0, count * (keyed.answered + control.answered) - _total(counters, series))
        least = answered - lost - failed
        most = answered - max(0, lost - count * (control.answered + keyed.sessions))
    sure = own_keys and knows_gateway(seen)
    return max(0, min(least, answered)) if sure else 0, later - (answered - most)

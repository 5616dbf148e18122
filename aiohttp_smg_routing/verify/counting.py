"""What the gateway's counters tell of a kind of worker, which is a pool here."""

import re
from typing import Literal

from .facts import CACHE_KEEPERS, KEY_BRANCHES, KEY_ONLY_POLICIES, UNCOUNTED_POLICIES
from .seen import Counters, Seen
from .summary import Summary

CHANCE = 0.001  # less likely than this to be chance counts as seen

Use = Literal["used", "not used", "untold"]


def pools(seen: Seen) -> tuple[str, ...]:
    """Return the kinds of workers to judge: those that keep a cache and have a choice.

    Nothing where neither the gateway's list of workers nor its counters say which there are.
    """
    if seen.workers is not None:
        keepers = [name for name in CACHE_KEEPERS if name in seen.workers]
        return tuple(name for name in keepers if seen.workers[name] != 1) or tuple(keepers)
    counted = seen.counters.pools if seen.counters else {}
    return tuple(name for name in CACHE_KEEPERS if name in counted)


def answering(names: tuple[str, ...]) -> str:
    """Return the kind of worker that an answer names: the decode worker, where there is one."""
    return "decode" if "decode" in names else "regular"


def worker_count(seen: Seen) -> int | None:
    """Return how many workers the largest pool has as far as anyone tells, or None."""
    named = {turn.worker for turn in seen.turns if turn.worker}
    listed = [seen.workers.get(name, 0) for name in CACHE_KEEPERS] if seen.workers else [0]
    return max(*listed, len(named)) or None


def is_ours(seen: Seen) -> bool:
    """Tell whether the counters are of our calls, of all and of no others."""
    answered = sum(turn.outcome != "failed" for turn in seen.turns)
    return seen.counters is not None and answered <= seen.counters.calls <= seen.sent


def knows_gateway(seen: Seen) -> bool:
    """Tell whether the metrics are of the gateway that was called: the probe shows in them."""
    return seen.probe is not None and seen.probe.calls > 0


def policy_of(counters: Counters, pool: str) -> str | None:
    """Return the policy of a pool; None where it chose nothing, or several policies did."""
    policies = [*counters.pools.get(pool, {})]
    return policies[0] if len(policies) == 1 else None


def series_of(counters: Counters, policy: str) -> str:
    """Return the policy in whose name calls with a key count: ``manual`` under the override."""
    return policy if policy in counters.branches else "manual"


def _mates(counters: Counters, series: str) -> tuple[int, int]:
    """Return how many pools count in a series by their policy's name, and how many may besides."""
    policies = [policy_of(counters, name) or "" for name in counters.pools if name in CACHE_KEEPERS]
    explicit = policies.count(series)
    return explicit, sum(series_of(counters, name) == series for name in policies) - explicit


def sharing(counters: Counters, pool: str) -> int:
    """Return how many pools count in the series of this one, itself included."""
    series = series_of(counters, policy_of(counters, pool) or "")
    explicit, others = _mates(counters, series)
    return explicit + (others if _total(counters, series) > explicit * counters.calls else 0)


def keyed_calls(counters: Counters, pool: str) -> int:
    """Return in how many calls the key chose the pool's worker.

    Pools that count in one series share it; those that do so by their policy's name come first.
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
    """Tell by the counters whether the key chose the pool's workers, in all calls or in none."""
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
    """Tell whether this gateway has seen keys, or has a policy that follows nothing else."""
    counters, names = seen.counters, pools(seen)
    if counters is None or not names or not (is_ours(seen) and knows_gateway(seen)):
        return False
    return all(
        policy_of(counters, pool) in KEY_ONLY_POLICIES or key_use(seen, pool) == "used"
        for pool in names
    )


def counts_any_call(seen: Seen, pool: str) -> bool:
    """Tell whether calls without a key count as routed by one, as the probe's few did."""
    policy = policy_of(seen.counters or Counters(), pool)
    if seen.probe is None or policy is None:
        return False
    return _total(seen.probe, series_of(seen.counters or Counters(), policy)) > 0


def one_for_all(seen: Seen) -> bool:
    """Tell whether one worker of several got every call, whatever its key: that is no chance."""
    got, there = seen.counters and seen.counters.workers, worker_count(seen)
    keys = len({(t.arm, t.session, t.arm == "control" and t.number) for t in seen.turns})
    return bool(got and there and len(got) == 1 < there and there ** (1.0 - keys) < CHANCE)


def keys_shared(seen: Seen, keyed: Summary, control: Summary, pool: str) -> bool:
    """Tell whether sessions must have had one key between them, by the pins or by the hash.

    Ids that another run may have had can be pinned from then: of those only the tail tells.
    """
    counters = seen.counters
    if counters is None or key_use(seen, pool) != "used":
        return False
    keys = keyed.sessions + control.answered
    series = series_of(counters, policy_of(counters, pool) or "")
    if series != "manual":
        workers = {*keyed.workers, *control.workers}
        there = worker_count(seen) or 1
        return keyed.named and len(workers) == 1 and there ** (1.0 - keys) < CHANCE
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
    """Return how many later turns the key brought to their session's worker: at least, at most.

    ``own_keys`` is whether each session is known to have a key of its own: the counters say that a
    key was used, never whose. Where they tell nothing, anything from none to all is possible.
    """
    counters, later = seen.counters, keyed.later
    policy = policy_of(counters, pool) if counters else None
    if counters is None or policy is None or not is_ours(seen) or counts_any_call(seen, pool):
        return 0, later
    series, count = series_of(counters, policy), sharing(counters, pool)
    is_stable = not (seen.load.overloaded or seen.has_changed or counters.troubles)
    if not keyed_calls(counters, pool) or (series != "manual" and not is_stable):
        return 0, later  # a hash counts as such though the worker that it names is left out
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

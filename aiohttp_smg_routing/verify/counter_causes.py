"""Finds causes in the gateway's counters."""

from collections.abc import Iterator

from . import known_causes
from .cause import Cause
from .counting import (
    counts_any_call,
    is_ours,
    key_count,
    key_use,
    keyed_calls,
    keys_shared,
    may_lose_workers,
    one_for_all,
    policy_of,
    pools,
    sharing,
)
from .facts import (
    NO_KEY_BRANCHES,
    POLICY_ADVICE,
    POOL_POLICIES,
    REPLICAS_ADVICE,
    UNCOUNTED_POLICIES,
)
from .seen import Counters, Seen
from .summary import Summary


def by_counters(
    seen: Seen, counters: Counters, keyed: Summary, control: Summary
) -> Iterator[Cause]:
    """Yield the causes that the gateway's counters show."""
    ours = keyed.answered + control.answered
    unused = [pool for pool in pools(seen) if key_use(seen, pool) == "not used"]
    if unused and seen.load.overloaded:
        pass  # an overloaded gateway ignores its policy: the notes say so
    elif unused:
        yield _not_used(seen, counters, unused)
    elif counters.calls < ours:
        right = "the gateway that the session server calls" if seen.plan.through else "this one"
        yield known_causes.replicas(
            seen.load.kind,
            seen.plan.metrics,
            counters.calls,
            ours,
            f"Give the metrics of {right} with --metrics URL.",
            hashes={*counters.branches} == {"consistent_hashing"},
        )
    else:
        yield from _by_pool(seen, counters, ours)
    if counters.calls > seen.sent:
        if missed := counters.of("occupied_miss"):  # the gateway's own retries may be the rest
            yield known_causes.worker_lost(seen.load.kind, missed)
        yield other_calls(seen, counters)
    elif not unused and counters.calls >= ours:
        yield from _by_branches(seen, counters, keyed, control)


def _by_pool(seen: Seen, counters: Counters, ours: int) -> Iterator[Cause]:
    """Yield why the counters can't tell, or that keys are lost."""
    for pool in pools(seen):
        policy, used = policy_of(counters, pool), keyed_calls(counters, pool)
        if policy in UNCOUNTED_POLICIES:
            yield known_causes.uncounted(
                policy,
                "Run it with --concurrency 1 when nothing else calls the gateway: then its "
                "counters name the worker of each turn.",
            )
        elif counts_any_call(seen, pool):
            yield known_causes.any_key(policy)
        elif 0 < used < ours:
            yield _key_lost(seen, f"{policy}", used, ours)


def _by_branches(
    seen: Seen, counters: Counters, keyed: Summary, control: Summary
) -> Iterator[Cause]:
    """Yield what the branches show: pins made again, shared keys, or keys that change."""
    manual = counters.branches.get("manual", {})
    vacant, hits = manual.get("vacant", 0), manual.get("occupied_hit", 0)
    share = max((sharing(counters, pool) for pool in pools(seen)), default=1)
    pins = share * (len({turn.session for turn in seen.turns if turn.arm == "keyed"}))
    pins += share * sum(turn.arm == "control" for turn in seen.turns)
    if seen.plan.through and vacant > pins and hits < vacant - pins:
        yield known_causes.key_changes(vacant, f"{counters.calls} calls")
    elif vacant > pins:
        yield Cause(
            "pinned_again",
            f"The gateway made {vacant} pins for {pins} keys: replicas behind one address do not "
            "share them, and a restart forgets them.",
            f"{REPLICAS_ADVICE[seen.load.kind]}.",
        )
    if spilled := counters.of("cap_respill"):
        yield known_causes.spilled(spilled)
    elif is_ours(seen) and any(keys_shared(seen, keyed, control, pool) for pool in pools(seen)):
        sessions = key_count(seen)
        told = f"tells only {vacant // share or 1} of {sessions} sessions apart"
        if "manual" in counters.branches and not vacant:
            told = f"met no new key in {sessions} sessions"
        unless = "unless its hash ring lacks workers, " if may_lose_workers(seen) else ""
        yield known_causes.shared_key(told, unless)
    moved = keyed.outcomes["moved"]
    if missed := counters.of("occupied_miss"):
        yield known_causes.worker_lost(seen.load.kind, missed)
    elif moved and counters.of("routing_key_hit") >= keyed.answered + control.answered:
        yield Cause(
            "worker_lost",
            f"{moved} turns moved although the gateway hashes the key: workers failed, or came or "
            "went, or a session's key changes.",
            known_causes.WORKER_ADVICE,
        )


def other_calls(seen: Seen, counters: Counters) -> Cause:
    """Return the cause for counters that have more calls than this run made."""
    return Cause(
        "other_calls",
        f"The gateway whose metrics are at {seen.plan.metrics} routed {counters.calls} calls, more "
        f"than the {seen.sent} that were sent: its own retries, or calls of others.",
        "Run it when nothing else calls the gateway, and check that --metrics is of this one.",
    )


def _not_used(seen: Seen, counters: Counters, unused: list[str]) -> Cause:
    """Return why the key chose no worker in the pools ``unused``."""
    kind = seen.load.kind
    if counters.calls == 0:
        return Cause(
            "key_lost",
            f"None of the session server's calls reached the gateway whose metrics are at "
            f"{seen.plan.metrics}.",
            known_causes.SERVER_ADVICE,
        )
    policies = " and ".join(sorted({policy_of(counters, pool) or "unknown" for pool in unused}))
    if one_for_all(seen) and policies in UNCOUNTED_POLICIES:
        sent = "what the session server sends" if seen.plan.through else seen.plan.header
        return Cause(
            "wrong_header",
            f"All {counters.calls} calls came to one worker, whatever their key: the policy is "
            f"{policies}, but it does not route on {sent}.",
            POLICY_ADVICE[kind],
        )
    if len(unused) < len(pools(seen)):
        pool = unused[0]
        worth = (
            "the prefix is computed there, so each turn computes it again"
            if pool == "prefill"
            else "the prefix is computed by the prefill worker, which the key does choose; what a "
            "decode worker keeps of a session is lost"
        )
        return Cause(
            f"{pool}_policy",
            f"The policy of the {pool} workers is {policies}, which does not route on the key: "
            f"{worth}.",
            f"Launch the gateway with --{pool}-policy {POOL_POLICIES[kind]}.",
        )
    if not counters.of(*NO_KEY_BRANCHES):
        if counters.of("no_healthy_workers"):
            return known_causes.no_healthy_workers(policies)
        return known_causes.policy(kind, policies)
    return _key_lost(seen, policies, 0, counters.calls)


def _key_lost(seen: Seen, policies: str, used: int, calls: int) -> Cause:
    return known_causes.key_lost(
        policies,
        used,
        calls,
        known_causes.SERVER_ADVICE
        if seen.plan.through
        else "Check what is in front of the gateway: a proxy may drop the header. Give --header "
        "NAME if the gateway reads another one.",
    )

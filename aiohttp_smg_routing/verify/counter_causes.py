"""Finds causes in the gateway's counters."""

from collections.abc import Iterator

from .cause import Cause
from .counting import (
    counts_any_call,
    is_ours,
    key_use,
    keyed_calls,
    keys_shared,
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

_WORKER_ADVICE = "See GET /workers and the logs of the workers that are not healthy."
_SERVER_ADVICE = (
    "Look at the session server, at the likeliest first: does it call another host than the "
    "gateway of the plugin's config? Does a source find a session id in each request? Is the hook "
    "on the ClientSession that calls the gateway? Is the plugin enabled?"
)


def by_counters(
    seen: Seen, counters: Counters, keyed: Summary, control: Summary
) -> Iterator[Cause]:
    """Yield the causes that the gateway's counters show."""
    ours = keyed.answered + control.answered
    unused = [pool for pool in pools(seen) if key_use(seen, pool) == "not used"]
    if unused and seen.load.overloaded:
        pass  # the notes say so: an overloaded gateway leaves its policy aside
    elif unused:
        yield _not_used(seen, counters, unused)
    elif counters.calls < ours:
        yield _replicas(seen, counters.calls, ours)
    else:
        yield from _by_pool(seen, counters, ours)
    if counters.calls > seen.sent:
        yield other_calls(seen, counters)
    elif not unused and counters.calls >= ours:
        yield from _by_branches(seen, counters, keyed, control)


def _by_pool(seen: Seen, counters: Counters, ours: int) -> Iterator[Cause]:
    """Yield why the counters can't tell, or that keys are lost."""
    for pool in pools(seen):
        policy, used = policy_of(counters, pool), keyed_calls(counters, pool)
        if policy in UNCOUNTED_POLICIES:
            yield Cause(
                "uncounted",
                f"The gateway's policy is {policy}: its counters do not tell whether the key is "
                "used.",
                "Run it with --concurrency 1 when nothing else calls the gateway: then its "
                "counters name the worker of each turn.",
            )
        elif counts_any_call(seen, pool):
            yield _any_key(policy)
        elif 0 < used < ours:
            yield _key_lost(seen, f"{policy}", used, ours)


def _any_key(policy: str | None) -> Cause:
    if policy == "prefix_hash":
        return Cause(
            "prefix_hash",
            "The gateway's policy is prefix_hash: SMG 1.10 and newer hash the key in place of the "
            "prompt, but these counters do not tell whether it arrives.",
            "See that the key reaches the gateway, or launch it with --policy manual or --policy "
            "consistent_hashing, whose counters tell.",
        )
    return Cause(
        "any_key",
        "The gateway counts calls without our key, too, as routed by a key: consistent_hashing "
        "before SMG 1.13 hashes Authorization, X-Forwarded-For or Cookie where there is no key.",
        "Use SMG 1.13 or --policy manual, whose counters tell; and see that nothing before the "
        "gateway puts a key on every call.",
    )


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
        yield Cause(
            "key_changes",
            f"The gateway met {vacant} new keys in {counters.calls} calls: the session server "
            "sends a session's turns under more than one key.",
            "Point session_id at an id that is the same in each turn of a session.",
        )
    elif vacant > pins:
        yield Cause(
            "pinned_again",
            f"The gateway made {vacant} pins for {pins} keys: replicas behind one address do not "
            "share them, and a restart forgets them.",
            f"{REPLICAS_ADVICE[seen.load.kind]}.",
        )
    if spilled := counters.of("cap_respill"):
        yield Cause(
            "shared_key",
            f"The gateway took {spilled} calls to another worker because too many with the same "
            "key were in flight at once.",
            "Give each session an id of its own.",
        )
    elif is_ours(seen) and any(keys_shared(seen, keyed, control, pool) for pool in pools(seen)):
        sessions = keyed.sessions + control.answered
        told = f"tells only {vacant // share or 1} of {sessions} sessions apart"
        if "manual" in counters.branches and not vacant:
            told = f"met no new key in {sessions} sessions"
        yield Cause(
            "shared_key",
            f"The gateway {told}: they share a key.",
            "Give each session an id, and so a key, of its own.",
        )
    moved = keyed.outcomes["moved"]
    if missed := counters.of("occupied_miss"):
        text = f"{missed} calls found the worker of their session gone."
        yield Cause("worker_lost", text, _WORKER_ADVICE)
    elif moved and counters.of("routing_key_hit") >= keyed.answered + control.answered:
        yield Cause(
            "worker_lost",
            f"{moved} turns moved although the gateway hashes the key: workers failed, or came or "
            "went, or a session's key changes.",
            _WORKER_ADVICE,
        )


def other_calls(seen: Seen, counters: Counters) -> Cause:
    """Return the cause for counters that have more calls than this run made."""
    return Cause(
        "other_calls",
        f"The gateway whose metrics are at {seen.plan.metrics} routed {counters.calls} calls, more "
        f"than the {seen.sent} that were sent: its own retries, or calls of others.",
        "Run it when nothing else calls the gateway, and see that --metrics is of this one.",
    )


def _replicas(seen: Seen, calls: int, ours: int) -> Cause:
    if calls == 0:
        return Cause(
            "other_gateway",
            f"The gateway whose metrics are at {seen.plan.metrics} routed none of these calls.",
            "Give the metrics of this one with --metrics URL.",
        )
    return Cause(
        "replicas",
        f"The gateway whose metrics are at {seen.plan.metrics} routed {calls} of {ours} calls: "
        "others behind the same address routed the rest, and replicas do not share their pins.",
        f"{REPLICAS_ADVICE[seen.load.kind]}.",
    )


def _not_used(seen: Seen, counters: Counters, unused: list[str]) -> Cause:
    """Return why the key chose no worker in the pools ``unused``."""
    kind = seen.load.kind
    if counters.calls == 0:
        return Cause(
            "key_lost",
            f"None of the session server's calls reached the gateway whose metrics are at "
            f"{seen.plan.metrics}.",
            _SERVER_ADVICE,
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
        text = f"The gateway's policy is {policies}: it does not route on the key."
        if counters.of("no_healthy_workers"):
            text = f"The gateway's policy is {policies}, but it finds no healthy worker for a call."
            return Cause("no_healthy_workers", text, _WORKER_ADVICE)
        return Cause("policy", text, POLICY_ADVICE[kind])
    return _key_lost(seen, policies, 0, counters.calls)


def _key_lost(seen: Seen, policies: str, used: int, calls: int) -> Cause:
    return Cause(
        "key_lost",
        f"The policy is {policies}, but only {used} of {calls} calls came with a key that the "
        "gateway accepts.",
        _SERVER_ADVICE
        if seen.plan.through
        else "Look at what stands before the gateway: a proxy may drop the header. Give --header "
        "NAME if the gateway reads another one.",
    )

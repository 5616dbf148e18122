"""Every cause that the command knows: what explains a verdict, and what to do about it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..gateway import VALID_KEY
from .evidence import (
    counts_any_call,
    counts_no_key,
    from_workers,
    keys_shared,
    more_than_chance,
    worker_count,
)
from .facts import KEY_BRANCHES, NO_KEY_BRANCHES
from .seen import Answer, Counters, Failure, Seen, Summary, by_session

_REPLICAS_ADVICE = (
    "Run one gateway, or --policy consistent_hashing, on which replicas agree, or a balancer that "
    "hashes the key"
)
_POLICY_ADVICE = (
    "Launch the gateway with --policy manual or --policy consistent_hashing, or keep its policy "
    "and add --routing-key-override."
)
_WORKER_ADVICE = "See GET /workers and the logs of the workers that are not healthy."


@dataclass(frozen=True, slots=True)
class Cause:
    """What explains the verdict, or is worth knowing beside it, and what to do about it."""

    name: str
    text: str
    advice: str


def failures(seen: Seen) -> Iterator[Cause]:
    """Yield a cause for each kind of failure, the commonest first."""
    counts: dict[Failure, int] = {}
    for failure in [seen.failure, *(turn.failure for turn in seen.turns)]:
        if failure:
            # One address stands for all sessions of a session server.
            alike = Failure(failure.kind, failure.url.origin(), failure.status, failure.text)
            counts[alike] = counts.get(alike, 0) + 1
    shown = set()
    for failure in sorted(counts, key=counts.__getitem__, reverse=True):
        if (failure.kind, failure.status) not in shown:
            shown.add((failure.kind, failure.status))
            yield _failure(seen, failure)


def _failure(seen: Seen, failure: Failure) -> Cause:
    said = f" ({failure.text})" if failure.text else ""
    model = str(seen.plan.model)
    unknown = model in failure.text if seen.models is None else model not in seen.models
    match failure:
        case Failure(kind="refused"):
            return Cause(
                "refused",
                f"No connection to {failure.url}{said}.",
                "Check the address, and that the server runs and can be reached from here.",
            )
        case Failure(kind="timeout"):
            return Cause(
                "timeout",
                f"{failure.url} did not answer in time.",
                "Look whether its workers are busy or stuck; allow more with --timeout SECONDS.",
            )
        case Failure(status=400 | 404) if unknown:
            return Cause(
                "unknown_model",
                f"{failure.url} has no model {model!r}{said}.",
                f"Name one that it has with --model: {', '.join(seen.models)}."
                if seen.models
                else "It has none: see GET /workers, whether its workers are there and healthy.",
            )
    return _status(failure, said)


def _status(failure: Failure, said: str) -> Cause:
    """Return the cause for an answer that is an error, or that nobody can read."""
    answers = f"{failure.url} answers {failure.status}{said}."
    match failure.status:
        case None:
            return Cause(
                "broken",
                f"{failure.url} gives no whole answer{said}.",
                "Call it by hand and read its log: it should stream chat completions.",
            )
        case 401 | 403:
            advice = "Put the API key into SMG_API_KEY, or name its file with --api-key-file."
        case 404:
            advice = "Check the URL: the path of the calls comes behind it (/v1/chat/completions)."
        case 503:
            advice = "It has no worker to spare: see GET /workers and the log of the gateway."
        case 300 | 301 | 302 | 303 | 307 | 308:
            advice = "Give the URL that it points to: no redirect is followed."
        case _:
            advice = "Read the log of the gateway and of its workers."
    return Cause(f"http_{failure.status}", answers, advice)


def routing(
    seen: Seen, keyed: Summary, unkeyed: Summary, answer: Answer, min_kept: float
) -> Iterator[Cause]:
    """Yield what explains that the sessions were not pinned, or that it can't be told.

    Where they are pinned, it yields only why the counters say something else.
    """
    if not keyed.answered:
        return
    counters = seen.counters
    foreign = counters is not None and counters.calls > seen.sent
    if answer == "pinned":
        if counters and foreign and counters.of(*KEY_BRANCHES) < keyed.answered:
            yield _other_calls(seen, counters)
        return
    if worker_count(seen) == 1:
        yield Cause(
            "one_worker",
            "The gateway has one worker for this model.",
            "Start a second one; until then there is nothing to pin.",
        )
        return
    better = more_than_chance(keyed, unkeyed)
    if counters is not None:
        yield from _by_counters(seen, counters, keyed, unkeyed, answer)
        if keyed.outcomes["moved"] and counters.of("routing_key_hit") >= keyed.answered:
            yield Cause(
                "worker_lost",
                f"{keyed.outcomes['moved']} turns moved although the gateway hashes the key: "
                "workers failed, or came or went, or a session's key changes.",
                _WORKER_ADVICE,
            )
    elif answer == "not pinned":
        yield _by_moves(better)
    evidence = from_workers(keyed)
    kept = evidence.later and evidence.kept >= min_kept * evidence.later - 1e-9
    if answer == "could not tell" and kept and not better:
        yield from _no_difference(seen, evidence.later, unkeyed)


def _by_counters(
    seen: Seen, counters: Counters, keyed: Summary, unkeyed: Summary, answer: Answer
) -> Iterator[Cause]:
    ours = keyed.answered + unkeyed.answered
    used = counters.of(*KEY_BRANCHES)
    foreign = counters.calls > seen.sent
    begun = len(by_session(seen.turns, "keyed"))
    if counters.calls < ours:
        yield _replicas(seen, counters.calls, ours)
    elif counts_any_call(seen):
        yield Cause(
            "any_key",
            f"The gateway counts {used} calls as routed by a key, those without ours as well: "
            "consistent_hashing before SMG 1.13 hashes Authorization, X-Forwarded-For or Cookie "
            "where there is no key.",
            "Use SMG 1.13 or --policy manual, whose counters tell; and see that nothing before the "
            "gateway puts a key on every call.",
        )
    elif counts_no_key(counters):
        yield Cause(
            "prefix_hash",
            "The gateway's policy is prefix_hash: SMG 1.10 and newer hash the key in place of the "
            "prompt, but these counters do not tell whether it arrives.",
            "See that the key reaches the gateway, or launch it with --policy manual or --policy "
            "consistent_hashing, whose counters tell.",
        )
    elif used < keyed.answered and (answer == "not pinned" or not foreign):
        yield _not_used(seen, counters, used, keyed.answered)
    if foreign:
        yield _other_calls(seen, counters)
    elif counters.of("vacant") > begun:
        yield Cause(
            "pinned_again",
            f"The gateway made {counters.of('vacant')} pins for {begun} sessions: "
            "replicas behind one address do not share them, and a restart forgets them.",
            f"{_REPLICAS_ADVICE}.",
        )
    if counters.of("cap_respill"):
        yield Cause(
            "shared_key",
            f"The gateway took {counters.of('cap_respill')} calls to another worker because too "
            "many with the same key were in flight at once.",
            "Give each session an id of its own.",
        )
    elif keys_shared(seen, keyed):
        apart = 1 if counters.of("routing_key_hit") else counters.of("vacant")
        yield Cause(
            "shared_key",
            f"The gateway tells only {apart} of {keyed.sessions} sessions apart: they share a key.",
            "Give each session an id, and so a key, of its own.",
        )
    if counters.of("occupied_miss"):
        yield Cause(
            "worker_lost",
            f"{counters.of('occupied_miss')} calls found the worker of their session gone.",
            _WORKER_ADVICE,
        )


def _other_calls(seen: Seen, counters: Counters) -> Cause:
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
        f"{_REPLICAS_ADVICE}.",
    )


def _not_used(seen: Seen, counters: Counters, used: int, calls: int) -> Cause:
    policies = " and ".join(sorted(counters.selections)) or "unknown"
    if not used and not counters.of(*NO_KEY_BRANCHES):
        return Cause(
            "policy",
            f"The gateway's policy is {policies}: it does not route on the key.",
            _POLICY_ADVICE,
        )
    advice = (
        "Look at the session server: is the plugin set up, enabled, and attached to the "
        "ClientSession that calls the gateway?"
        if seen.plan.through
        else "Look at what stands before the gateway: a proxy may drop the header."
    )
    return Cause(
        "key_lost",
        f"The policy is {policies}, but the gateway saw a key that it takes on {used} of {calls} "
        "calls.",
        advice,
    )


def _by_moves(better: bool) -> Cause:
    if better:
        return Cause(
            "pins_lost",
            "The key keeps sessions together, but not always: replicas behind one address do not "
            "share their pins, a restart forgets them, and a worker that fails loses them.",
            f"{_REPLICAS_ADVICE}; give the gateway's metrics with --metrics URL to tell which it "
            "is.",
        )
    return Cause(
        "policy",
        "The gateway does not route on the key, or the key does not reach it, or replicas that do "
        "not share their pins stand behind the address.",
        f"{_POLICY_ADVICE} Give its metrics with --metrics URL to tell which it is.",
    )


def _no_difference(seen: Seen, later: int, unkeyed: Summary) -> Iterator[Cause]:
    kept, moved = unkeyed.outcomes["kept"], unkeyed.outcomes["moved"]
    if moved > kept or later < 10:
        yield Cause(
            "too_few_turns",
            f"{later} later turns with the key are too few to rule out chance.",
            "Play more with --sessions and --turns.",
        )
    elif kept:
        if seen.counters is None:
            advice = "Give the gateway's metrics with --metrics URL: they tell if it used the key."
        elif seen.counters.calls > seen.sent:
            advice = "Run it when nothing else calls the gateway: then its counters tell."
        else:
            advice = "Its counters do not tell here: see the cause before this one."
        yield Cause(
            "same_without_key",
            "The sessions without the key stayed together as well: the policy follows the prompt, "
            "as cache_aware does until workers are busy, or something else that all calls share.",
            advice,
        )


def notes(seen: Seen, keyed: Summary, answer: Answer) -> Iterator[Cause]:
    """Yield what is worth knowing whatever the verdict is."""
    if seen.stopped:
        yield _stopped(seen)
    if not seen.plan.through:
        yield from _keys(seen)
    if not keyed.answered:
        return
    if not keyed.workers:
        yield _unnamed(seen)
    if seen.counters is None and seen.no_counters:
        yield Cause(
            "no_counters",
            f"The gateway's counters could not be read at {seen.plan.metrics}: {seen.no_counters}.",
            "Give the address of its metrics with --metrics URL (the gateway's --prometheus-port).",
        )
    if len(keyed.workers) == 1 and keyed.sessions >= 8 and worker_count(seen) != 1:
        yield Cause(
            "one_sided",
            f"All {keyed.sessions} sessions with the key began on one worker.",
            "Spread them with --assignment-mode min_group, and use keys that differ in more than "
            "their tail.",
        )
    yield from _caches(keyed, answer)


def _stopped(seen: Seen) -> Cause:
    if seen.stopped == "time_limit":
        return Cause(
            "time_limit",
            f"The run ended at its limit of {seen.plan.time_limit:g} s, after {len(seen.turns)} "
            "calls: the verdict is on those.",
            "Play less with --sessions or --turns, or allow more with --time-limit SECONDS.",
        )
    return Cause(
        "gave_up",
        f"The run ended after {len(seen.turns)} calls, because the last ones all failed.",
        "Find out why they failed, then try again.",
    )


def _unnamed(seen: Seen) -> Cause:
    if any(turn.worker for turn in seen.turns):
        return Cause(
            "worker_hidden",
            "The session server does not say which worker answered: only the "
            "gateway's counters can tell.",
            "Set hide_worker_ids = false there to see the worker of each turn.",
        )
    return Cause(
        "no_worker_name",
        "The gateway does not name the worker that answered, like SMG before 1.10 or one with gRPC "
        "workers: only its counters can tell.",
        "Use SMG 1.10 or newer to see the worker of each turn.",
    )


def _keys(seen: Seen) -> Iterator[Cause]:
    keys = seen.plan.session_ids()
    bad = [key for key in keys if not VALID_KEY.fullmatch(key)]
    if bad:
        size = len(bad[0].encode())
        wrong = f"{size} bytes long" if size > 128 else "not visible ASCII"
        yield Cause(
            "bad_key",
            f"Session ids such as {bad[0][:40]!r} are {wrong}: the gateway drops such a key without"
            " a word.",
            "Use 1 to 128 visible ASCII characters; the plugin sends a digest for any other id.",
        )
    if any(re.search(r"_[tr][0-9]+$", key) for key in keys):
        yield Cause(
            "key_tail",
            f"Session ids such as {keys[0][:40]!r} end like the number of a turn: under "
            "--routing-key-override the gateway takes that off, and ids that differ in nothing "
            "else share one pin.",
            "Put the number elsewhere in the id, or use --policy manual or consistent_hashing.",
        )


def _caches(keyed: Summary, answer: Answer) -> Iterator[Cause]:
    if keyed.cached_share is None:
        yield Cause(
            "no_cached_tokens",
            "The engines do not report cached prompt tokens.",
            "Launch SGLang with --enable-cache-report, vLLM with --enable-prompt-tokens-details.",
        )
    elif answer == "pinned" and keyed.cached_share < 0.5:
        yield Cause(
            "cold_cache",
            f"The sessions are pinned, but only {keyed.cached_share:.0%} of their prompt tokens "
            "came from a cache.",
            "See that prefix caching is on, and that a worker has room for its sessions.",
        )

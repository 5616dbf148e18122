"""Finds what is worth knowing, whatever the verdict is."""

import re
from collections.abc import Iterator

from ..gateway import VALID_KEY
from . import known_causes
from .cause import Cause
from .chance import beyond_chance
from .counting import (
    is_stable,
    key_count,
    keys_tell,
    may_lose_workers,
    worker_count,
    workers_reached,
)
from .facts import KV_USAGE_LIMIT
from .seen import Answer, Counters, Seen
from .summary import Summary


def notes(seen: Seen, keyed: Summary, answer: Answer) -> Iterator[Cause]:
    """Yield what is worth knowing."""
    if seen.stopped:
        yield _stopped(seen)
    if not seen.plan.through:
        yield from _keys(seen)
    if not keyed.answered:
        return
    if not keyed.named:
        yield _unnamed(seen)
    if seen.counters is None and seen.no_counters:
        yield Cause(
            "no_counters",
            f"The gateway's counters could not be read at {seen.plan.metrics}: {seen.no_counters}.",
            "Give the address of its metrics with --metrics URL (the gateway's --prometheus-port).",
        )
    if answer == "could not tell" and (seen.has_changed or (seen.counters or Counters()).troubles):
        yield Cause(
            "workers_changed",
            "Workers came, went, failed or were not healthy during the run. So some calls may have "
            "gone elsewhere than the key's counters say.",
            "See GET /workers, and run this again when all of them are healthy.",
        )
    if answer == "pinned" and seen.plan.through and seen.plan.concurrency == 1:
        yield Cause(
            "one_connection",
            "One call at a time may need only one connection of the session server: replicas "
            "behind the gateway's address, which do not share their pins, would not show.",
            "Run this again without --concurrency 1. The session server must then pass on the "
            "header that names the worker (SMG 1.10 and newer).",
        )
    yield from _spread(seen, keyed)
    yield from _load(seen)
    yield from _caches(keyed, answer)


def _stopped(seen: Seen) -> Cause:
    if seen.stopped == "time_limit":
        return Cause(
            "time_limit",
            f"The run ended at its limit of {seen.plan.time_limit:g} s, after {len(seen.turns)} "
            "calls: the verdict is about those.",
            "Play less with --sessions or --turns, or allow more with --time-limit SECONDS.",
        )
    return Cause(
        "gave_up",
        f"The run ended after {len(seen.turns)} calls, because the last ones all failed.",
        "Find out why they failed, then try again.",
    )


def _unnamed(seen: Seen) -> Cause:
    follow = "Give the gateway's metrics, and --concurrency 1: then its counters name the worker."
    if any(turn.worker for turn in seen.turns) or (seen.plan.through and seen.load.kind == "smg"):
        return Cause(
            "worker_hidden",
            "The session server does not say which worker answered, or the gateway does not.",
            "Let the session server pass on the header that names the worker: one that copies no "
            f"headers drops it, and so does hide_worker_ids = true. {follow}",
        )
    return Cause(
        "no_worker_name",
        "The gateway does not name the worker that answered, so nobody knows where a turn went. "
        "SMG before 1.10 or with gRPC workers, sglang-router and vllm-router never name it.",
        follow if seen.load.kind not in ("smg", None) else f"Use SMG 1.10 or newer. {follow}",
    )


def _keys(seen: Seen) -> Iterator[Cause]:
    keys = seen.plan.ids()
    bad = [key for key in keys if not VALID_KEY.fullmatch(key)]
    if bad:
        size = len(bad[0].encode())
        wrong = f"{size} bytes long" if size > 128 else "not visible ASCII"
        yield Cause(
            "bad_key",
            f"Session ids such as {bad[0][:40]!r} are {wrong}: SMG does not route on such a key.",
            "Use 1 to 128 visible ASCII characters; the plugin sends a digest for any other id.",
        )
    if seen.load.kind in ("smg", None) and any(re.search(r"_[tr][0-9]+$", key) for key in keys):
        yield Cause(
            "key_tail",
            f"Session ids such as {keys[0][:40]!r} end like the number of a turn: under SMG's "
            "--routing-key-override the gateway removes that number, and ids that differ only in "
            "it share one pin.",
            "Put the number elsewhere in the id.",
        )


def _spread(seen: Seen, keyed: Summary) -> Iterator[Cause]:
    reached, there, keys = workers_reached(seen), worker_count(seen) or 0, key_count(seen)
    can_tell = is_stable(seen) and not seen.load.circuits and keys_tell(seen)
    if may_lose_workers(seen) and can_tell and beyond_chance(reached, there, keys):
        yield known_causes.left_out(reached, there, keys)
    elif len(keyed.workers) == 1 and keyed.sessions >= 8 and there != 1:
        yield Cause(
            "one_sided",
            f"All {keyed.sessions} sessions that kept their key began on one worker.",
            known_causes.spread(seen.load.kind),
        )


def _load(seen: Seen) -> Iterator[Cause]:
    load = seen.load
    if load.circuits:
        yield known_causes.circuit_open(f"{load.circuits} of its workers", load.kind)
    if load.overloaded:
        yield known_causes.overloaded(load)
    elif load.can_protect and max(load.kv_usage.values(), default=0.0) < KV_USAGE_LIMIT:
        yield Cause(
            "overload_protection",
            "No worker is overloaded, so this run can't tell whether overload protection is on, as "
            "it is by default since SMG 1.12. It moves sessions off a worker that has 8 waiting "
            f"calls or a KV cache that is {KV_USAGE_LIMIT:.0%} full.",
            f"{known_causes.protection_off(load)}, unless you do already. Keep protection on only "
            "if the caches are too small for the sessions that must run at a time: then the job "
            "ends sooner.",
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
            "Check that prefix caching is on, and that a worker has room for its sessions.",
        )

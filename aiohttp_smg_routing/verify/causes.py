"""Finds why a gateway does not pin, or why nobody can tell, and what to do about it."""

from collections.abc import Iterator

from . import known_causes
from .cause import Cause
from .chance import more_than_chance
from .counter_causes import by_counters, other_calls
from .counting import answering, fresh_ids, key_use, pools
from .evidence import Evidence, bounds
from .facts import POLICY_ADVICE
from .seen import Answer, Seen
from .summary import Summary


def causes(
    seen: Seen, keyed: Summary, control: Summary, evidence: Evidence, answer: Answer
) -> Iterator[Cause]:
    """Yield why the sessions were not pinned, or why nobody can tell.

    If they were pinned, yield only why the counters disagree.
    """
    counters = seen.counters
    if evidence.played == "nothing":
        return
    if evidence.one_worker:
        yield known_causes.one_worker()
        return
    if answer == "pinned":
        if counters and counters.calls > seen.sent and evidence.key == "untold":
            yield other_calls(seen, counters)
        return
    if evidence.played == "too little":
        if not seen.stopped:
            yield _too_few(keyed.later)
        return
    if counters is not None:
        yield from by_counters(seen, counters, keyed, control)
    elif evidence.stayed == "moved":
        yield _by_moves(seen, better=evidence.better)
    yield from _unclear(seen, keyed, control)
    if evidence.stayed == "kept" and evidence.key != "not used" and not evidence.shared:
        yield from _no_difference(seen, keyed, control)


def _too_few(later: int) -> Cause:
    return Cause(
        "too_few_turns",
        f"{later} later turns are too few to rule out chance.",
        "Play more with --sessions and --turns.",
    )


def _by_moves(seen: Seen, *, better: bool) -> Cause:
    metrics = "give the gateway's metrics with --metrics URL to tell which it is."
    if better:
        return known_causes.pins_lost(seen.load.kind, metrics)
    return Cause(
        "policy",
        "The gateway does not route on the key, or the key does not reach it, or replicas that do "
        "not share their pins stand behind the address.",
        f"{POLICY_ADVICE[seen.load.kind]} {metrics.capitalize()}",
    )


def _unclear(seen: Seen, keyed: Summary, control: Summary) -> Iterator[Cause]:
    """Yield why it is unknown where turns went."""
    names = pools(seen)
    if not names:
        yield Cause(
            "workers_unknown",
            "Neither GET /workers nor the gateway's metrics could be read: there may be prefill "
            "workers, which no answer names.",
            "Give the gateway's metrics with --metrics URL.",
        )
    for known in bounds(seen, keyed, control):
        by_name = keyed.named and known.pool == answering(names)
        unused = key_use(seen, known.pool) == "not used"
        if by_name or unused or known.least or known.most < keyed.later:
            continue
        answered = keyed.answered + control.answered
        if seen.plan.through and seen.counters and seen.counters.calls >= answered:
            yield Cause(
                "whose_key",
                "The gateway's counters say that a key was used, never whose: the session server "
                "may send a session's turns under more than one key, or one for all sessions.",
                "Let it pass on the header that names the worker (hide_worker_ids = false), or run "
                "this with --concurrency 1: then the gateway's counters name the worker of each "
                "turn.",
            )
        elif seen.counters and not fresh_ids(seen):
            yield Cause(
                "old_ids",
                "Another run may have used these session ids. If so, they are pinned already.",
                "Put {run} into --session-id.",
            )
        elif known.pool == "prefill":
            yield Cause(
                "prefill_unknown",
                "The gateway has prefill workers, which no answer names: only its counters can "
                "tell whether the key chooses them.",
                "Give the gateway's metrics with --metrics URL, and run it when nothing else calls "
                "the gateway.",
            )


def _no_difference(seen: Seen, keyed: Summary, control: Summary) -> Iterator[Cause]:
    kept, moved = control.outcomes["kept"], control.outcomes["moved"]
    if more_than_chance(keyed, control):
        yield Cause(
            "keys_unseen",
            "Sessions stayed, but nothing shows that a key did it: a session server may write the "
            "session's id into the prompt, which cache_aware follows.",
            _to_tell(seen),
        )
    elif moved > kept:
        yield _too_few(keyed.later)
    elif kept:
        yield Cause(
            "same_without_key",
            "Turns in new sessions stayed together too. The policy follows the prompt, as "
            "cache_aware does until workers are busy, or something else that all calls share.",
            _to_tell(seen),
        )


def _to_tell(seen: Seen) -> str:
    """Say how to find out whether the key did it."""
    if seen.counters is None:
        return "Give the gateway's metrics with --metrics URL: they tell if it used the key."
    if seen.counters.calls > seen.sent:
        return "Run it when nothing else calls the gateway: then its counters tell."
    if seen.plan.through:
        return "Run it without --through first, to see whether the gateway itself pins."
    return "Its counters do not tell here: see the cause before this one."

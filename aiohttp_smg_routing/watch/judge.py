"""Judges what a moment shows: are sessions pinned now? All functions here are pure."""

from ..verify.evidence import FEWEST
from ..verify.judge import Verdict
from ..verify.seen import Answer, Counters
from .basis import Basis, basis_of, hashes, is_below, keyed_by, pools_of, tells
from .causes import causes
from .view import Share, View


def judge(view: View, min_kept: float) -> Verdict:
    """Return the verdict. "Pinned" needs the share ``min_kept`` of keyed calls, and of kept ones.

    It is about the current calls, or about all so far if too few of those tell of pins.
    """
    basis = basis_of(view)
    told = causes(view, basis, min_kept)
    answer, sentence = _decide(view, basis, {cause.name for cause in told}, min_kept)
    return Verdict(answer, f"{answer.capitalize()}: {sentence}.", tuple(told))


def _decide(view: View, basis: Basis, found: set[str], min_kept: float) -> tuple[Answer, str]:
    """Return the answer of the first rule that applies; ``docs/watch.md`` has the rules."""
    counters, kept = basis.counters, basis.kept
    if nothing := _nothing(view, found):
        return "could not tell", nothing
    pools = pools_of(counters)
    if not (pools or basis.is_seen):
        return "could not tell", f"no call came to a worker that keeps a cache{basis.when}"
    for pool in pools:
        worker = "worker" if pool == "regular" else f"{pool} worker"
        keyed = keyed_by(counters, pool)
        said = f"the key chose the {worker} of {keyed.part} of {keyed.of} calls{basis.when}"
        if tells(view, counters, pool) and is_below(basis.without_probes(keyed), min_kept):
            return "not pinned", said
    if basis.is_seen or "manual" in counters.branches:
        whose, when = ("session", basis.server_when) if basis.is_seen else ("key", basis.when)
        said = f"{kept.part} of {kept.of} later calls came to the worker of their {whose}{when}"
    if is_below(kept, min_kept):
        return "not pinned", said
    is_told = basis.is_seen or all(tells(view, counters, pool) for pool in pools)
    if basis.is_seen and hashes(counters):
        found = found - {"replicas"}
    unsure = _unsure(counters, kept, found, is_told=is_told)
    return ("could not tell", unsure.format(said)) if unsure else ("pinned", said)


def _nothing(view: View, found: set[str]) -> str:
    """Return why there is nothing to judge, or an empty string."""
    if view.gateway.page is None:
        return (
            "the gateway's metrics could not be read"
            if view.gateway.error
            else "the gateway has not answered yet"
        )
    if view.gateway.error:
        return "the gateway's metrics can't be read any more"
    if not view.totals.calls:
        return "the gateway has routed no call"
    return "only one worker is known, so every session stays on it" if "one_worker" in found else ""


def _unsure(counters: Counters, kept: Share, found: set[str], *, is_told: bool) -> str:
    """Return why it is unknown whether sessions stay, or an empty string; ``{}`` is the counts."""
    if not is_told:
        return "the gateway's counters do not tell whether a key chose the worker"
    if found & {"shared_key", "key_changes", "replicas", "other_gateway"}:
        return "{}; but see below"
    if kept.of >= FEWEST:
        return ""
    if "manual" in counters.branches or counters.calls < FEWEST:
        return "{}, which are too few to tell"
    return (
        "{}, but the gateway does not count the keys that come again: give the metrics URL of a "
        "session server that has had ten later turns"
    )

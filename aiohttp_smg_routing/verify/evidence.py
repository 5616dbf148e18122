"""Weighs what was seen: answers each question that the rules of the verdict ask."""

from dataclasses import dataclass
from typing import Literal

from .chance import more_than_chance
from .counting import (
    Use,
    answering,
    kept_by_counters,
    key_use,
    keys_arrive,
    keys_shared,
    pools,
    worker_count,
)
from .seen import Seen
from .summary import Summary

FEWEST = 10  # later turns; fewer are too few for a verdict

Played = Literal["nothing", "too little", "enough"]
Stayed = Literal["kept", "moved", "unclear"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The answers; ``judge.decide()`` needs nothing else."""

    played: Played
    """Whether enough later turns were played."""
    one_worker: bool
    """Whether the gateway has only one worker to choose from."""
    key: Use
    """Whether the key chose the worker of all calls or of none, by the gateway's counters."""
    stayed: Stayed
    """Whether the later turns stayed on their session's worker."""
    shared: bool
    """Whether sessions shared one key."""
    better: bool
    """Whether sessions stayed together more than turns in new sessions did, beyond chance.

    Through a session server, the gateway must also have seen keys: the server may write the
    session's id into the prompt, which ``cache_aware`` follows.
    """
    direct: bool
    """Whether ``verify`` itself chose the keys, so that each session surely has its own."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many later turns stayed on their worker of a pool: at least, and at most."""

    pool: str
    least: int
    most: int

    def stayed(self, later: int, min_kept: float) -> Stayed:
        """Return what the bounds mean if the share ``min_kept`` of ``later`` turns must stay."""
        bar = min_kept * later - 1e-9  # the exact share is enough
        return "moved" if self.most < bar else "kept" if self.least >= bar else "unclear"


def bounds(seen: Seen, keyed: Summary, control: Summary) -> list[Bounds]:
    """Return what is known about each pool, from the named workers, else from the counters."""
    direct = seen.plan.through is None
    names = pools(seen)
    own_keys = direct or more_than_chance(keyed, control)
    known = []
    for pool in names:
        least, most = kept_by_counters(seen, keyed, control, pool, own_keys=own_keys)
        if keyed.named and pool == answering(names):
            least = keyed.outcomes["kept"]
            most = min(most, keyed.later - keyed.outcomes["moved"])
        known.append(Bounds(pool, least, most))
    return known


def weigh(seen: Seen, keyed: Summary, control: Summary, min_kept: float) -> Evidence:
    """Return the evidence in what was seen. The worst of several pools counts."""
    names, direct = pools(seen), seen.plan.through is None
    uses = [key_use(seen, pool) for pool in names]
    stays = [known.stayed(keyed.later, min_kept) for known in bounds(seen, keyed, control)]
    if not names and keyed.named and keyed.outcomes["moved"] > (1 - min_kept) * keyed.later + 1e-9:
        stays = ["moved"]  # in any kind of worker
    return Evidence(
        _played(seen, keyed),
        worker_count(seen) == 1,
        "not used" if "not used" in uses else "used" if {*uses} == {"used"} else "untold",
        "moved" if "moved" in stays else "kept" if {*stays} == {"kept"} else "unclear",
        any(keys_shared(seen, keyed, control, pool) for pool in names),
        more_than_chance(keyed, control) and (direct or keys_arrive(seen)),
        direct,
    )


def _played(seen: Seen, keyed: Summary) -> Played:
    if not keyed.answered:
        return "nothing"
    enough = max(FEWEST, seen.plan.planned / 2)
    return "enough" if keyed.later >= enough else "too little"

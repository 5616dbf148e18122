"""The order of all turns of both arms, and their prompts."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from .seen import ARMS, Arm, Plan

_FIRST_WORDS, _LATER_WORDS = 100, 25  # of the user, in a session's first turn and in each later one
_VOCABULARY = (
    "amber anchor basin birch breeze canyon cedar cloud copper coral delta drift ember fern field "
    "flint forest frost garden glacier granite harbor hazel island ivory juniper lagoon lantern "
    "maple marble meadow mist moss north oak ocean olive orchard pearl pebble pine plain quartz "
    "rain raven reef ridge river sand shadow shore silver slate snow spring stone storm summit "
    "thunder tide valley velvet willow winter"
)


@dataclass(slots=True)
class Session:
    """A session under way. A turn holds ``lock``, so that turns of a session never overlap."""

    arm: Arm
    number: int
    words: Random
    messages: list[dict[str, str]] = field(default_factory=list)
    worker: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def schedule(plan: Plan) -> Iterator[tuple[Session, int]]:
    """Yield all turns of both arms, round by round, in pairs of a turn of each arm.

    Each round has a new order. In a fixed order ``round_robin`` would look pinned: if the number of
    workers divides the calls of a round, each session meets the same worker every time.
    """
    random = seeded(plan.run)
    pairs = [
        [Session(arm, number, seeded(f"{plan.run} {arm} {number}")) for arm in ARMS]
        for number in range(1, plan.sessions + 1)
    ]
    for number in range(1, plan.turns + 1):
        random.shuffle(pairs)
        for pair in pairs:
            random.shuffle(pair)
            for session in pair:
                yield session, number


def seeded(seed: str) -> Random:
    """Return a random generator that makes the same words for the same seed."""
    return Random(seed)  # noqa: S311 - nothing here is a secret


def message(text: str) -> dict[str, str]:
    """Return the user's message."""
    return {"role": "user", "content": text}


def prompt(before: list[dict[str, str]], words: Random, run: str) -> str:
    """Return the user's next message. No two sessions begin alike: none warms another's cache."""
    chosen = words.choices(_VOCABULARY.split(), k=_LATER_WORDS if before else _FIRST_WORDS)
    opening = "" if before else f"{words.getrandbits(64):x} {run}: "
    return f"{opening}{' '.join(chosen)}. Go on."

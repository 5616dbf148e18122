"""The arms: how the gateway is launched, and which key the calls carry."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .read import Session

Key = Literal["no", "session", "group", "later turns"]
"""What pins a call: nothing, its session, its group, or its session from the second turn on."""

MIN_GROUP = ("--assignment-mode", "min_group")
PROTECTION = "--worker-overload-protection"
DEFAULT_TIMES = {"--load-monitor-interval": 10, "--eviction-interval-secs": 60}
"""Seconds between two times that SMG asks a worker for its load, and that ``cache_aware`` cuts what
it remembers of the prompts to its size, unless told otherwise."""


def times(scale: float) -> tuple[str, ...]:
    """Return the arguments that have these times pass as fast as the model's.

    SMG takes whole seconds, and one at the least.
    """
    scaled = {option: max(1, round(time / scale)) for option, time in DEFAULT_TIMES.items()}
    return tuple(word for option, time in scaled.items() for word in (option, str(time)))


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy of the gateway, its further arguments, and the key of the calls."""

    policy: str
    args: tuple[str, ...] = ()
    key: Key = "session"

    @property
    def name(self) -> str:
        """What the tables call it."""
        words = [self.policy, *(arg for arg in self.args if not arg.startswith("--"))]
        name = " ".join(words)
        name += " + override" * ("--routing-key-override" in self.args)
        notes = {"no": ["no key"], "session": [], "group": ["group key"]}
        said = notes.get(self.key, ["no key on first turns"])
        said += ["overload protection"] * (PROTECTION in self.args)
        return ", ".join([name, *said])

    def protected(self) -> "Arm":
        """Return the same arm with worker overload protection, SMG's default since 1.12."""
        return replace(self, args=(*self.args, PROTECTION))


PINNED = Arm("manual", MIN_GROUP)
HASHED = Arm("consistent_hashing")
RANDOM, ROUND_ROBIN, CACHE_AWARE, POWER_OF_TWO = (
    Arm(policy, key="no") for policy in ("random", "round_robin", "cache_aware", "power_of_two")
)
MAIN = (
    PINNED,
    PINNED.protected(),
    HASHED,
    Arm("manual", ("--assignment-mode", "random")),
    CACHE_AWARE,
    POWER_OF_TWO,
    ROUND_ROBIN,
    RANDOM,
)
FURTHER = (
    Arm("manual", ("--assignment-mode", "min_load")),
    Arm("manual", ("--assignment-mode", "delegate")),
    Arm("round_robin", ("--routing-key-override",)),
    Arm("cache_aware", ("--routing-key-override",)),
    replace(PINNED, key="later turns"),
    HASHED.protected(),
    CACHE_AWARE.protected(),
    RANDOM.protected(),
)
GROUPED = replace(PINNED, key="group")
FURTHER_GROUPED = (replace(HASHED, key="group"),)


def arms(sessions: Sequence[Session], *, every: bool) -> Iterator[Arm]:
    """Yield the arms that play a trace: the main ones, or ``every`` one."""
    has_groups = any(session.group for session in sessions)
    yield PINNED
    if has_groups:
        yield GROUPED
    yield from MAIN[1:]
    if every:
        yield from FURTHER
        if has_groups:
            yield from FURTHER_GROUPED

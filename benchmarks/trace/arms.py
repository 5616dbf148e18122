"""The arms: the gateway's policy and arguments, and the key of the calls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .read import Session

Key = Literal["no", "session", "group", "later turns"]
"""The key of a call: none, its session, its group, or its session from the second turn on."""

MIN_GROUP = ("--assignment-mode", "min_group")
PROTECTION = "--worker-overload-protection"
DEFAULT_TIMES = {"--load-monitor-interval": 10, "--eviction-interval-secs": 60}
"""SMG's default intervals in seconds: to poll a worker's load, and to trim the prompts that
``cache_aware`` remembers."""


def times(scale: float) -> tuple[str, ...]:
    """Return the arguments that scale these intervals to the model's time.

    SMG accepts whole seconds only, from one up.
    """
    scaled = {option: max(1, round(time / scale)) for option, time in DEFAULT_TIMES.items()}
    return tuple(word for option, time in scaled.items() for word in (option, str(time)))


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy of the gateway, further arguments, and the key of the calls."""

    policy: str
    args: tuple[str, ...] = ()
    key: Key = "session"

    @property
    def name(self) -> str:
        """The name in the tables."""
        words = [self.policy, *(arg for arg in self.args if not arg.startswith("--"))]
        name = " ".join(words)
        name += " + override" * ("--routing-key-override" in self.args)
        notes = {"no": ["no key"], "session": [], "group": ["group key"]}
        said = notes.get(self.key, ["no key on first turns"])
        said += ["overload protection"] * (PROTECTION in self.args)
        return ", ".join([name, *said])

    def protected(self) -> "Arm":
        """Return the arm with worker overload protection, SMG's default since 1.12."""
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
    """Yield the arms to play a trace with: the main ones, or ``every`` one."""
    has_groups = any(session.group for session in sessions)
    yield PINNED
    if has_groups:
        yield GROUPED
    yield from MAIN[1:]
    if every:
        yield from FURTHER
        if has_groups:
            yield from FURTHER_GROUPED

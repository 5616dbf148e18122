"""What a run plans, and what it sees: plain values that every other file here shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from yarl import URL

from ..gateway import ROUTING_KEY_HEADER

Arm = Literal["keyed", "control"]
Answer = Literal["pinned", "not pinned", "could not tell"]
Outcome = Literal["first", "kept", "moved", "unknown", "failed"]
FailureKind = Literal["refused", "timeout", "status", "broken"]
Kind = Literal["smg", "sglang-router", "vllm-router"]

ARMS: Final[tuple[Arm, ...]] = ("keyed", "control")
ARM_TITLES: Final[Mapping[Arm, str]] = {
    "keyed": "same session",
    "control": "new session each turn",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played, and where: ``sessions`` of ``turns`` calls in each of the two arms."""

    gateway: URL
    metrics: URL
    through: str | None = None
    """The URL of a session server, which all turns go through; it may have ``{session_id}``."""
    session_header: str | None = None
    """The header that names the session to the session server."""
    session_json: str | None = None
    """The dotted path in the JSON body at which the session server finds the session's id."""
    create: URL | None = None
    """The session server's call that makes a session, and answers its id."""
    header: str = str(ROUTING_KEY_HEADER)
    """The header that carries the key, where the turns go straight to the gateway."""
    model: str | None = None
    sessions: int = 24
    turns: int = 6
    concurrency: int = 8
    max_tokens: int = 16
    timeout: float = 30
    """Seconds for one call."""
    time_limit: float = 300
    """Seconds for the whole run."""
    session_id: str = "verify-{run}-{n}"
    """The id of session ``n``; it is the key as well."""
    run: str = ""
    """Told apart from every other run by this, and so are its transcripts."""

    @property
    def planned(self) -> int:
        """How many later turns each arm has if the run comes to its end."""
        return self.sessions * (self.turns - 1)

    def keyed_id(self, session: int) -> str:
        """Return the id of a session of the arm that keeps its sessions."""
        return self._id(session)

    def control_id(self, session: int, turn: int) -> str:
        """Return the id of the new session that plays a turn of the other arm."""
        return self._id(self.sessions + (session - 1) * self.turns + turn)

    def ids(self) -> list[str]:
        """Return every session id of the run."""
        return [self._id(number) for number in range(1, self.sessions * (self.turns + 1) + 1)]

    def _id(self, number: int) -> str:
        return self.session_id.replace("{run}", self.run).replace("{n}", str(number))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no answer: ``text`` is what the server, or the system, had to say."""

    kind: FailureKind
    url: URL
    status: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One call: turn ``number`` of session ``session``, both counted from 1."""

    arm: Arm
    session: int
    number: int
    outcome: Outcome
    worker: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    first_token_seconds: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """By how much the gateway's own counters grew."""

    pools: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """How many workers each policy chose, in each kind of worker: ``{"regular": {"manual": 9}}``.

    Prefill and decode workers are two kinds, and a call has one of each.
    """
    branches: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What each policy that knows the key did: ``{"manual": {"vacant": 2, "occupied_hit": 7}}``."""
    workers: Mapping[str, int] = field(default_factory=dict)
    """How many calls each worker got."""
    troubles: int = 0
    """How often a worker failed a health check or a call, or its circuit opened or closed."""

    @property
    def calls(self) -> int:
        """The calls that this gateway routed."""
        return max((sum(pool.values()) for pool in self.pools.values()), default=0)

    def of(self, *branches: str) -> int:
        """Return how often one of ``branches`` was taken, by whichever policy."""
        return sum(taken.get(name, 0) for taken in self.branches.values() for name in branches)


@dataclass(frozen=True, slots=True)
class Load:
    """What the gateway's metrics say of its kind, and of its workers' load."""

    kind: Kind | None = None
    """Which program it is; None where its metrics are not read."""
    can_protect: bool = False
    """Whether it leaves overloaded workers out unless it is told not to: SMG 1.12 and newer."""
    overloaded: int = 0
    """The workers that it leaves out."""
    kv_usage: Mapping[str, float] = field(default_factory=dict)
    """How full each worker's KV cache is, 0 to 1, as the gateway has polled it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """All that a run has seen."""

    plan: Plan
    turns: tuple[Turn, ...] = ()
    sent: int = 0
    """Turns that were begun, those that were cut off at the end included."""
    sent_for_sessions: int = 0
    """Calls beyond those: to make and delete sessions, and first turns again."""
    models: tuple[str, ...] | None = None
    """The names of the gateway's models; None where it doesn't say."""
    workers: Mapping[str, int] | None = None
    """How many healthy workers of each kind serve the model; None where the gateway doesn't say."""
    counters: Counters | None = None
    """What the turns made of the gateway's counters."""
    probe: Counters | None = None
    """What a few calls without any key made of them, before."""
    no_counters: str = ""
    """Why there are no counters."""
    load: Load = field(default_factory=Load)
    failure: Failure | None = None
    """Why the run could not begin."""
    stopped: Literal["", "time_limit", "failures"] = ""
    """Why it ended early."""
    seconds: float = 0
    has_changed: bool = False
    """Whether there were other healthy workers at the end than before the turns."""

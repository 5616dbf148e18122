"""The plan of a run and what it has seen: plain values that all other files here share."""

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

NO_ANSWER: Final = "no answer in time"

ARMS: Final[tuple[Arm, ...]] = ("keyed", "control")
ARM_TITLES: Final[Mapping[Arm, str]] = {
    "keyed": "same session",
    "control": "new session each turn",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play, and where: both arms have ``sessions`` sessions of ``turns`` turns."""

    gateway: URL
    metrics: URL
    through: str | None = None
    """The URL of a session server for all turns; it may have ``{session_id}`` in it."""
    session_header: str | None = None
    """The header that names the session to the session server."""
    session_json: str | None = None
    """The dotted path in the JSON body at which the session server finds the session's id."""
    create: URL | None = None
    """The URL of the session server's POST that makes a session and answers with its id."""
    header: str = str(ROUTING_KEY_HEADER)
    """The header that carries the key if the turns go straight to the gateway."""
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
    """A text unique to this run, which also makes its conversations unique."""

    @property
    def planned(self) -> int:
        """How many later turns each arm has in a complete run."""
        return self.sessions * (self.turns - 1)

    def keyed_id(self, session: int) -> str:
        """Return the id of a session in the arm that keeps its sessions."""
        return self._id(session)

    def control_id(self, session: int, turn: int) -> str:
        """Return the id of the new session for a turn in the other arm."""
        return self._id(self.sessions + (session - 1) * self.turns + turn)

    def ids(self) -> list[str]:
        """Return every session id of the run."""
        return [self._id(number) for number in range(1, self.sessions * (self.turns + 1) + 1)]

    def _id(self, number: int) -> str:
        return self.session_id.replace("{run}", self.run).replace("{n}", str(number))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no answer; ``text`` comes from the server or the system."""

    kind: FailureKind
    url: URL
    status: int | None = None
    text: str = ""

    @property
    def reason(self) -> str:
        """The failure in a few words."""
        if self.status is None:
            return self.text or NO_ANSWER
        return (
            f"it answers {self.status} ({self.text})" if self.text else f"it answers {self.status}"
        )


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
    """How much the gateway's own counters grew."""

    pools: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """How often each policy chose a worker of each kind: ``{"regular": {"manual": 9}}``.

    Prefill and decode workers are two kinds, and a call has one of each.
    """
    branches: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The branches of each policy that reads the key: ``{"manual": {"occupied_hit": 7}}``."""
    workers: Mapping[str, int] = field(default_factory=dict)
    """How many calls each worker got."""
    troubles: int = 0
    """How often a worker failed a health check or a call, or its circuit breaker changed state."""

    @property
    def calls(self) -> int:
        """The calls that this gateway routed."""
        return max((sum(pool.values()) for pool in self.pools.values()), default=0)

    def of(self, *branches: str) -> int:
        """Return how often any policy took one of ``branches``."""
        return sum(taken.get(name, 0) for taken in self.branches.values() for name in branches)


@dataclass(frozen=True, slots=True)
class GatewayLoad:
    """What the gateway's metrics say about its kind and its workers' load."""

    kind: Kind | None = None
    """Which program it is; None if its metrics could not be read."""
    can_protect: bool = False
    """Whether it leaves out overloaded workers by default, as SMG 1.12 and newer do."""
    overloaded: int = 0
    """How many workers it leaves out."""
    kv_usage: Mapping[str, float] = field(default_factory=dict)
    """How full each worker's KV cache is, from 0 to 1, when the gateway last polled it."""
    circuits: int = 0
    """To how many workers it sends nothing because too many calls failed there."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that a run has seen."""

    plan: Plan
    turns: tuple[Turn, ...] = ()
    sent: int = 0
    """How many turns were begun, including those that the end of the run cut off."""
    sent_for_sessions: int = 0
    """How many more calls made and deleted sessions, or repeated a first turn."""
    models: tuple[str, ...] | None = None
    """The names of the gateway's models; None if it doesn't say."""
    workers: Mapping[str, int] | None = None
    """How many healthy workers of each kind serve the model; None if the gateway doesn't say."""
    counters: Counters | None = None
    """How much the turns raised the gateway's counters."""
    probe: Counters | None = None
    """How much a few earlier calls without a key raised the counters."""
    no_counters: str = ""
    """Why there are no counters."""
    load: GatewayLoad = field(default_factory=GatewayLoad)
    failure: Failure | None = None
    """Why the run could not start."""
    stopped: Literal["", "time_limit", "failures"] = ""
    """Why the run ended early."""
    seconds: float = 0
    has_changed: bool = False
    """Whether the healthy workers changed between the start of the turns and the end."""

"""What a run plans, and what it sees: plain values that every other file here shares."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import Final, Literal

from yarl import URL

Arm = Literal["keyed", "unkeyed"]
Answer = Literal["pinned", "not pinned", "could not tell"]
Outcome = Literal["first", "kept", "moved", "unknown", "failed"]
FailureKind = Literal["refused", "timeout", "status", "broken"]

ARMS: Final[tuple[Arm, ...]] = ("keyed", "unkeyed")
ARM_TITLES: Final[Mapping[Arm, str]] = {"keyed": "with the key", "unkeyed": "without the key"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played, and where: ``sessions`` of ``turns`` calls in each of the two arms."""

    gateway: URL
    metrics: URL
    through: str | None = None
    """The session server's URL with ``{session_id}`` in it; it carries the arm with the key."""
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
    """The id of session ``n`` in the arm with the key; it is the key as well."""
    run: str = ""
    """Told apart from every other run by this, and so are its transcripts."""

    def session_ids(self) -> list[str]:
        """Return the ids of the sessions in the arm with the key."""
        numbers = range(1, self.sessions + 1)
        return [
            self.session_id.replace("{run}", self.run).replace("{n}", str(number))
            for number in numbers
        ]


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
    """By how much the gateway's own counters grew during the run."""

    branches: Mapping[str, int]
    """What ``manual`` and ``consistent_hashing`` did with the calls: ``{"vacant": 24}``."""
    selections: Mapping[str, int]
    """How many workers were chosen under each policy."""
    pools: int = 1
    """Kinds of workers, each of which has a choice per call: 2 for prefill and decode."""

    @property
    def calls(self) -> int:
        """The calls that this gateway routed."""
        return sum(self.selections.values()) // self.pools

    def of(self, *branches: str) -> int:
        """Return how many calls took one of ``branches``."""
        return sum(self.branches.get(branch, 0) for branch in branches) // self.pools


@dataclass(frozen=True, slots=True)
class Seen:
    """All that a run has seen."""

    plan: Plan
    turns: tuple[Turn, ...] = ()
    sent: int = 0
    """Turns that were begun, those that were cut off at the end included."""
    sent_for_sessions: int = 0
    """Calls beyond those: to make sessions at the session server, and their first turns again."""
    models: tuple[str, ...] | None = None
    """The names of the gateway's models; None where it doesn't say."""
    workers: int | None = None
    """The healthy workers that the gateway lists for the model; None where it doesn't say."""
    counters: Counters | None = None
    no_counters: str = ""
    """Why there are no counters."""
    failure: Failure | None = None
    """Why the run could not begin."""
    stopped: Literal["", "time_limit", "failures"] = ""
    """Why it ended early."""
    seconds: float = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm in figures."""

    outcomes: Counter[Outcome]
    sessions: int
    later: int
    """The turns that had a worker to stay on: those after the first answer of their session."""
    workers: Counter[str] = field(default_factory=Counter)
    """How many sessions began on each worker."""
    cached_share: float | None = None
    """The share of the later turns' prompt tokens that came from a KV cache, 0 to 1."""
    first_token_p50: float | None = None
    """Seconds to the first token of a later turn; half of them took longer."""
    first_token_p95: float | None = None

    @property
    def answered(self) -> int:
        """The calls that were answered."""
        return sum(self.outcomes.values()) - self.outcomes["failed"]

    @property
    def kept_share(self) -> float:
        """The share of the later turns that are known to have been kept, 0 to 1."""
        return self.outcomes["kept"] / self.later if self.later else 0.0


def summarise(turns: Iterable[Turn], arm: Arm) -> Summary:
    """Return the figures of ``arm``."""
    mine = [turn for turn in turns if turn.arm == arm]
    answered = [turn for turn in mine if turn.outcome != "failed"]
    later = _later(by_session(mine, arm))
    times = sorted(
        turn.first_token_seconds for turn in later if turn.first_token_seconds is not None
    )
    percentiles = quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return Summary(
        outcomes=Counter(turn.outcome for turn in mine),
        sessions=len({turn.session for turn in answered}),
        later=len(later),
        workers=Counter(turn.worker for turn in answered if turn.outcome == "first" if turn.worker),
        cached_share=cached_share(later),
        first_token_p50=percentiles[9] if times else None,
        first_token_p95=percentiles[18] if times else None,
    )


def _later(sessions: Iterable[list[Turn]]) -> list[Turn]:
    """Return the turns of each session after the first one that was answered.

    A session that never had an answer may have moved at any turn but the first.
    """
    later = []
    for turns in sessions:
        answered = (place for place, turn in enumerate(turns) if turn.outcome != "failed")
        later += turns[next(answered, 0) + 1 :]
    return later


def cached_share(turns: Iterable[Turn]) -> float | None:
    """Return which share of the prompt tokens was cached, of the turns that tell; None if none."""
    told = [
        (turn.cached_tokens, turn.prompt_tokens)
        for turn in turns
        if turn.cached_tokens is not None and turn.prompt_tokens
    ]
    if not told:
        return None
    return sum(cached for cached, _ in told) / sum(prompt for _, prompt in told)


def with_cached_tokens(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Return ``turns`` with 0 cached tokens where an engine left the figure out.

    SGLang and vLLM leave out a 0. Where no turn at all tells a figure, none is known.
    """
    turns = tuple(turns)
    if all(turn.cached_tokens is None for turn in turns):
        return turns
    return tuple(
        replace(turn, cached_tokens=0)
        if turn.cached_tokens is None and turn.prompt_tokens is not None
        else turn
        for turn in turns
    )


def by_session(turns: Iterable[Turn], arm: Arm) -> list[list[Turn]]:
    """Return the turns of each session of ``arm``, in order."""
    sessions: defaultdict[int, list[Turn]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.number):
        if turn.arm == arm:
            sessions[turn.session].append(turn)
    return list(sessions.values())

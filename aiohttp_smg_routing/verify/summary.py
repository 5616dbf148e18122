"""Sums up each arm in figures."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import quantiles

from .seen import Arm, Outcome, Turn


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm in figures."""

    outcomes: Counter[Outcome]
    sessions: int
    later: int
    """How many turns had a worker to stay on: those after the first answer of their session."""
    workers: Counter[str] = field(default_factory=Counter)
    """How many sessions began on each worker."""
    cached_share: float | None = None
    """The share of the later turns' prompt tokens that came from a KV cache, 0 to 1."""
    first_token_p50: float | None = None
    """Seconds to the first token of a later turn; half of them took longer."""
    first_token_p95: float | None = None

    @property
    def answered(self) -> int:
        """How many calls were answered."""
        return sum(self.outcomes.values()) - self.outcomes["failed"]

    @property
    def named(self) -> bool:
        """Whether the worker of any turn is known. If not, nobody knows which turns were kept."""
        return bool(self.workers)

    @property
    def kept_share(self) -> float | None:
        """The share of later turns that are known to be kept, 0 to 1; None if unknown."""
        return self.outcomes["kept"] / self.later if self.later and self.named else None


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
    """Return the cached share of the prompt tokens, over the turns that report it, or None."""
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

    SGLang and vLLM leave out a 0. If no turn at all has a figure, none is known.
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

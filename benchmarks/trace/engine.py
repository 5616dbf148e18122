"""The model of an engine: what it computes and when. It has no clock and no network.

- *Prefill* is serial: one prompt after the other, in the order of arrival, at a rate that counts
  only the tokens that the cache does not have.
- *Decode*: all running calls get a token in each step; a step takes longer with more calls.
  A prefill either doesn't slow it down, or stops it (``Speed.stalls``). Engines that share their
  compute are in between.
- A call waits while the admitted calls have more than ``Speed.budget`` tokens to prefill, while too
  many calls run, or while they leave too little room in the cache for its prompt and its output.
  Then it is admitted and counts as running, though its prefill may begin later. Nothing is
  preempted.

The gateway skips a worker that reports eight waiting calls, so it matters which calls wait. vLLM
and SGLang admit as many prompts to a step as fit into its budget of tokens. The model admits them
at any time, because it has no steps of prefill. It reserves the room for the whole call at once,
while vLLM takes blocks as it computes them. So the model reports a slightly higher KV usage.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .cache import BLOCK, Held, PrefixCache, chain, tokens_in

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed and capacity of an engine. Times are in the model's seconds."""

    prefill: float = 10_000
    """Tokens per second."""

    step: float = 0.015
    """Seconds of a decode step; each running call adds ``step_per_call`` seconds."""

    step_per_call: float = 0.0005
    stalls: bool = False
    """Whether a prefill stops decoding."""

    running: int = 64
    """The most calls that run at once."""

    budget: int = 8192
    """The most tokens that admitted calls may have to prefill when another call is admitted. vLLM
    calls it ``max_num_batched_tokens``, and SGLang ``chunked_prefill_size``."""

    tokens: int = 100_000
    """The size of the cache, in tokens."""

    per_token: float = 4
    """Characters in a token."""

    def needs(self, characters: int) -> int:
        """Return the tokens that a call needs, in whole blocks."""
        return BLOCK * -(-tokens_in(characters, self.per_token) // BLOCK)


@dataclass(slots=True)
class Job:
    """A call as the engine processes it."""

    prompt: str
    output: str
    at: float
    """When the call arrived. All times here are in the model's seconds."""

    begun: float = 0
    """When its prefill began."""

    first_token: float = 0
    """When its prefill ended."""

    done: float = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    held: Held | None = field(default=None, repr=False)
    names: list[int] = field(default_factory=list, repr=False)


class TooLongError(ValueError):
    """A call that doesn't fit into the whole cache."""


class Engine:
    """The engine of a worker. It advances when it is told the time."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.cache = PrefixCache(speed.tokens // BLOCK)
        self.waiting: deque[Job] = deque()
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self._prefilling: deque[Job] = deque()
        self._admits_at = NEVER  # when the budget admits the next call
        self._decoding: list[tuple[float, int, Job]] = []
        self._steps = 0.0  # decode steps since the beginning
        self._steps_at = 0.0
        self._count = 0

    @property
    def running(self) -> int:
        """How many calls run, including those whose prefill has not begun."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def usage(self) -> float:
        """How much of the cache running calls hold, 0 to 1."""
        return self.cache.held / self.cache.blocks

    @property
    def next(self) -> float:
        """The time of the next event, ``inf`` if there is none."""
        prefilled = self._prefilling[0].first_token if self._prefilling else NEVER
        return min(prefilled, self._decoded, self._admits_at)

    @property
    def _decoded(self) -> float:
        if not self._decoding or self._is_stalled:
            return NEVER
        return self._steps_at + max(0, self._decoding[0][0] - self._steps) * self._step

    @property
    def _is_stalled(self) -> bool:
        return self.speed.stalls and bool(self._prefilling)

    @property
    def _step(self) -> float:
        return self.speed.step + self.speed.step_per_call * len(self._decoding)

    def take(self, job: Job) -> None:
        """Take a call that arrives at ``job.at``. Raises ``TooLongError``."""
        speed = self.speed
        if speed.needs(len(job.prompt) + len(job.output)) > speed.tokens:
            raise TooLongError(
                f"the call has {len(job.prompt) + len(job.output)} characters, and the cache has"
                f" {speed.tokens} tokens"
            )
        job.names = chain(job.prompt + job.output, speed.per_token)
        job.prompt_tokens = tokens_in(len(job.prompt), speed.per_token)
        job.output_tokens = tokens_in(len(job.output), speed.per_token)
        self.waiting.append(job)
        self._admit(job.at)

    def until(self, now: float) -> Iterator[Job]:
        """Advance to ``now``; yield the calls that finish."""
        while (at := self.next) <= now:
            decoded = self._decoded
            self._pass_time(at)
            if self._prefilling and self._prefilling[0].first_token <= at:
                prefilled = self._prefilling.popleft()
                self._count += 1
                until = self._steps + prefilled.output_tokens - 1
                heapq.heappush(self._decoding, (until, self._count, prefilled))
            elif decoded <= at:
                _, _, job = heapq.heappop(self._decoding)
                assert job.held is not None  # noqa: S101 - it runs
                self.cache.end(job.held, job.names)
                job.done = at
                self.output_tokens += job.output_tokens
                yield job
            self._admit(at)

    def _pass_time(self, at: float) -> None:
        if self._decoding and not self._is_stalled:
            self._steps += (at - self._steps_at) / self._step
        self._steps_at = at

    def _admit(self, now: float) -> None:
        """Admit the calls that fit into the budget and the cache; their prefills queue up."""
        speed = self.speed
        self._admits_at = NEVER
        while self.waiting and self.running < speed.running:
            begun = now
            if self._prefilling:
                begun = self._prefilling[-1].first_token
                admits_at = begun - speed.budget / speed.prefill
                if admits_at > now:
                    self._admits_at = admits_at
                    return
            job = self.waiting[0]
            prompt, characters = len(job.prompt), len(job.prompt) + len(job.output)
            held = self.cache.begin_call(job.names, prompt, characters, speed.per_token)
            if held is None:
                return
            self.waiting.popleft()
            job.held, job.begun = held, begun
            job.cached_tokens = held.reused(job.prompt_tokens)
            job.first_token = begun + (job.prompt_tokens - job.cached_tokens) / speed.prefill
            self._pass_time(now)
            self._prefilling.append(job)
            self.prompt_tokens += job.prompt_tokens
            self.cached_tokens += job.cached_tokens

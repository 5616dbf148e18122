"""The model of an engine: what it computes, when it is done. It knows no clock and no network.

- *Prefill* is serial: one prompt after the other, in the order of arrival, at a rate that counts
  only the tokens that the cache does not have.
- *Decode*: all running calls get a token in each step; a step takes longer with more calls.
  A prefill does not slow it down, or it brings it to a stand (``Speed.stalls``). Engines that share
  their compute are in between.
- A call waits while too many run, or while the running ones leave too little room in the cache for
  its prompt and its output. Nothing is preempted.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .cache import BLOCK, Held, PrefixCache, chain, tokens_in

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast an engine is, and how much it takes. The times are of the model."""

    prefill: float = 10_000
    """Tokens per second."""

    step: float = 0.015
    """Seconds of a decode step, and how much longer each running call makes it."""

    step_per_call: float = 0.0005
    stalls: bool = False
    """Whether decoding stands still during a prefill."""

    running: int = 64
    """Calls that run at once, at the most."""

    tokens: int = 100_000
    """The size of the cache."""

    per_token: float = 4
    """Characters of a token."""

    def needs(self, characters: int) -> int:
        """Return the tokens that a call needs, in whole blocks."""
        return BLOCK * -(-tokens_in(characters, self.per_token) // BLOCK)


@dataclass(slots=True)
class Job:
    """A call that an engine works on."""

    prompt: str
    output: str
    at: float
    """When it arrived, in seconds of the model, as all times here."""

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
    """A call that the whole cache has no room for."""


class Engine:
    """One worker's engine. It moves on when it is told what time it is."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.cache = PrefixCache(speed.tokens // BLOCK)
        self.waiting: deque[Job] = deque()
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self._prefilling: Job | None = None
        self._decoding: list[tuple[float, int, Job]] = []
        self._steps = 0.0  # of a call that decodes since the beginning
        self._steps_at = 0.0
        self._count = 0

    @property
    def running(self) -> int:
        """How many calls run."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def usage(self) -> float:
        """How much of the cache running calls hold, 0 to 1."""
        return self.cache.held / self.cache.blocks

    @property
    def next(self) -> float:
        """When something happens next, ``inf`` if nothing does."""
        prefilled = self._prefilling.first_token if self._prefilling else NEVER
        return min(prefilled, self._decoded)

    @property
    def _decoded(self) -> float:
        if not self._decoding or self._is_stalled:
            return NEVER
        return self._steps_at + max(0, self._decoding[0][0] - self._steps) * self._step

    @property
    def _is_stalled(self) -> bool:
        return self.speed.stalls and self._prefilling is not None

    @property
    def _step(self) -> float:
        return self.speed.step + self.speed.step_per_call * len(self._decoding)

    def take(self, job: Job) -> None:
        """Take a call, which has arrived now. Raises ``TooLongError``."""
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
        self._begin(job.at)

    def until(self, now: float) -> Iterator[Job]:
        """Do all that happens until then, and yield the calls that are done."""
        while (at := self.next) <= now:
            self._pass_time(at)
            prefilled = self._prefilling
            if prefilled and prefilled.first_token <= at:
                self._prefilling = None
                self._count += 1
                until = self._steps + prefilled.output_tokens - 1
                heapq.heappush(self._decoding, (until, self._count, prefilled))
            else:
                _, _, job = heapq.heappop(self._decoding)
                assert job.held is not None  # noqa: S101 - it runs
                self.cache.end(job.held, job.names)
                job.done = at
                self.output_tokens += job.output_tokens
                yield job
            self._begin(at)

    def _pass_time(self, at: float) -> None:
        if self._decoding and not self._is_stalled:
            self._steps += (at - self._steps_at) / self._step
        self._steps_at = at

    def _begin(self, now: float) -> None:
        """Begin the next prefill, if there is one and room for it."""
        if self._prefilling or not self.waiting or self.running >= self.speed.running:
            return
        job = self.waiting[0]
        prompt, characters = len(job.prompt), len(job.prompt) + len(job.output)
        held = self.cache.begin_call(job.names, prompt, characters, self.speed.per_token)
        if held is None:
            return
        self.waiting.popleft()
        job.held, job.begun = held, now
        job.cached_tokens = held.reused(job.prompt_tokens)
        job.first_token = now + (job.prompt_tokens - job.cached_tokens) / self.speed.prefill
        self._pass_time(now)
        self._prefilling = job
        self.prompt_tokens += job.prompt_tokens
        self.cached_tokens += job.cached_tokens

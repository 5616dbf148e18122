"""Agents that play sessions, hang up now and then, and check what the session server kept."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple, TypeVar

import aiohttp

from harness.agents import Agent, Message, Reply, Transcript
from harness.processes import Restartable
from harness.workers import reply_text

T = TypeVar("T")
Outcome = Literal["answered", "reported", "hung up", "lost", "crosstalk"]
ErrorKind = Literal["cut off", "gateway's", "other"]

WAIT_SECONDS = 120  # for an answer; then the turn is lost
SETTLE_SECONDS = 30  # by then a transcript must be right
HANG_UP_SECONDS = 0.1  # the longest wait of an agent that hangs up
HANG_UPS = 0.02  # the share of turns in which the agent hangs up
PAUSE_SECONDS = 1  # after an error, so that a failed worker may be back
STREAMED = 0.5  # the share of turns that are streamed
GATEWAYS_OWN = "X-SMG-Error-Code"  # a header of the gateway's own errors
NOTHING = Transcript(0, [])


class Report(NamedTuple):
    """A turn whose agent got an error, and the time that it was under way."""

    user: str
    text: str
    error: ErrorKind
    """Whether the answer was cut off, the error was the gateway's own, or neither."""

    since: float
    until: float


@dataclass(slots=True)
class Tally:
    """The outcomes of the turns of all agents."""

    turns: Counter[str] = field(default_factory=Counter)
    reported_as: Counter[str] = field(default_factory=Counter)
    reports: list[Report] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """The transcripts that differ from what the agents got."""

    in_flight: int = 0
    most_in_flight: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def played(self) -> int:
        """How many turns have ended."""
        return self.turns.total()

    def begin(self) -> None:
        """Count a turn that begins."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def end(self, outcome: Outcome) -> None:
        """Count a turn that has ended."""
        self.in_flight -= 1
        self.turns[outcome] += 1
        self._ended.set()

    async def until(self, turns: float) -> None:
        """Wait until so many turns have ended."""
        while self.played < turns:
            self._ended.clear()
            await self._ended.wait()


@dataclass(slots=True)
class Player:
    """Plays a session of an agent, sometimes hangs up, and checks the transcript."""

    agent: Agent
    gateway: Restartable[Any]
    server: Restartable[Any]
    random: Random
    tally: Tally
    said: list[Message] = field(default_factory=list)
    """The conversation up to the last answered turn."""

    kept: Transcript = NOTHING
    """The transcript that the session server must have; it begins empty after a kill."""

    left: list[Message] | None = None
    """The conversation of the turn that was just hung up on, with its reply; it may be kept too."""

    kills: int = 0
    """The number of the session server's kills when the session was created."""

    async def play(self, turns: int) -> None:
        """Play a whole session."""
        await self.begin()
        for number in range(turns):
            self.tally.begin()
            outcome = await self.turn(f"turn {number}")
            self.tally.end(outcome)
            if outcome == "reported":
                # An outage may be long on a slow machine, so no agent plays several turns into it.
                await self.gateway.up.wait()
                await asyncio.sleep(PAUSE_SECONDS)
            if outcome != "answered":
                await self.check()
        await self.check()
        await self.through_kills(self.agent.end)

    async def begin(self) -> None:
        """Create the session, with an empty transcript."""
        self.kept, self.left = NOTHING, None
        self.kills = self.server.kills
        await self.through_kills(self.agent.begin)

    async def turn(self, text: str) -> Outcome:
        """Play a turn; return its outcome."""
        messages = [*self.said, {"role": "user", "content": text}]
        expected = reply_text(self.agent.session_id, messages)
        whole = [*messages, {"role": "assistant", "content": expected}]
        wait = WAIT_SECONDS * 1.0
        if hangs_up := self.random.random() < HANG_UPS:
            wait = self.random.uniform(0, HANG_UP_SECONDS)
        streamed, since = self.random.random() < STREAMED, time.monotonic()
        try:
            got = await asyncio.wait_for(self.agent.turn(messages, stream=streamed), wait)
        except asyncio.TimeoutError:
            if not hangs_up:
                return "lost"
            self.left = whole
            return "hung up"
        if not got.answered:
            return self.failed(got, text, since)
        if got.text != expected:
            return "lost" if got.text is None else "crosstalk"
        self.said, self.kept = whole, Transcript(self.kept.turns + 1, whole)
        return "answered"

    def failed(self, got: Reply, text: str, since: float) -> Outcome:
        """Record the error that the agent got; return ``lost`` if it got none."""
        until = time.monotonic()
        kind: ErrorKind = "other"
        if got.whole:
            said = got.error.get("code") or got.error.get("message")
            told = f"{got.status} {said or got.body.decode(errors='replace')[:60]}"
            if GATEWAYS_OWN in got.headers:
                kind = "gateway's"
        elif got.status == 200:
            told = kind = "cut off"
        elif self.server.was_down(since, until):
            told = got.broke
        else:
            # A broken connection reports an error only if the server was down.
            return "lost"
        self.tally.reported_as[told] += 1
        self.tally.reports.append(Report(self.agent.session_id, text, kind, since, until))
        return "reported"

    async def through_kills(self, request: Callable[[], Awaitable[T]]) -> T | None:
        """Make a request about the session; return its result, or None if a kill lost the session.

        It repeats a request that a kill breaks.
        """
        while True:
            await self.server.up.wait()
            since = time.monotonic()
            try:
                return await request()
            except aiohttp.ClientError as error:
                is_gone = isinstance(error, aiohttp.ClientResponseError) and error.status == 404
                if is_gone and self.kills < self.server.kills:
                    return None
                if not self.server.was_down(since, time.monotonic()):
                    raise

    async def check(self) -> None:
        """Check that the session server kept each answered turn once, and no other turn.

        The turn that the agent just hung up on may still run. It may be kept or not, but once it is
        found kept it must stay.
        """
        # Once several transcripts are wrong, don't wait for the others.
        patience = SETTLE_SECONDS if len(self.tally.wrong) < 3 else 0
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            found = await self.through_kills(self.agent.transcript)
            if found is None:
                await self.begin()
                return
            if found == (self.kept.turns + 1, self.left):
                self.kept = found
            if found == self.kept:
                self.left = None
                return
            if asyncio.get_running_loop().time() > deadline:
                self.tally.wrong.append(
                    f"{self.agent.session_id}: {found.turns} turns instead of {self.kept.turns}, or"
                    " one more if it was just hung up in; the last messages are"
                    f" {found.messages[-2:]}"
                )
                return
            await asyncio.sleep(0.02)

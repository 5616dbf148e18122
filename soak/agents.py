"""Agents that play sessions, hang up now and then, and check what the session server kept."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import aiohttp
from yarl import URL

from .worker import reply_text

Message = dict[str, str]
Outcome = Literal["answered", "reported", "hung up", "lost", "crosstalk"]

WAIT_SECONDS = 120  # for an answer: after that it is lost
SETTLE_SECONDS = 30  # until a transcript must be right
HANG_UP_SECONDS = 0.1  # the longest that an agent which is to hang up waits for its answer
HANG_UPS = 0.02  # the share of the turns that an agent hangs up in
STREAMED = 0.5  # the share of the turns that are streamed


@dataclass(slots=True)
class Tally:
    """What came of the turns of all agents."""

    turns: Counter[str] = field(default_factory=Counter)
    reported_as: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """The first transcripts that were not what the agent got."""

    in_flight: int = 0
    most_in_flight: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def played(self) -> int:
        """How many turns have come to an end."""
        return self.turns.total()

    def begin(self) -> None:
        """Count a turn that begins."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def end(self, outcome: Outcome) -> None:
        """Count a turn that has come to an end."""
        self.in_flight -= 1
        self.turns[outcome] += 1
        self._ended.set()

    async def until(self, turns: float) -> None:
        """Wait until so many turns have come to an end."""
        while self.played < turns:
            self._ended.clear()
            await self._ended.wait()


@dataclass(slots=True)
class Agent:
    """One session's agent; each of its turns repeats all that was said before."""

    client: aiohttp.ClientSession
    server: URL
    session_id: str
    random: Random
    tally: Tally
    kept: list[Message] = field(default_factory=list)
    """The conversation up to the last turn that was answered."""

    answered: int = 0
    hung_up: int = 0
    left: list[list[Message]] = field(default_factory=list)
    """The conversations of the turns that it hung up in since, with their replies: whether the
    session server had the reply by then is not known."""

    @property
    def url(self) -> URL:
        """Where its session is."""
        return self.server / "sessions" / self.session_id

    async def play(self, turns: int) -> None:
        """Play a session from its beginning to its end."""
        body = {"session_id": self.session_id}
        async with self.client.post(self.server / "sessions", json=body) as response:
            response.raise_for_status()
        for number in range(turns):
            self.tally.begin()
            outcome = await self.turn(f"turn {number}")
            self.tally.end(outcome)
            if outcome == "reported":
                await self.check()
        await self.check()
        async with self.client.delete(self.url) as response:
            response.raise_for_status()

    async def turn(self, text: str) -> Outcome:
        """Play a turn; return what came of it."""
        messages = [*self.kept, {"role": "user", "content": text}]
        expected = reply_text(self.session_id, messages)
        whole = [*messages, {"role": "assistant", "content": expected}]
        wait = WAIT_SECONDS * 1.0
        if hangs_up := self.random.random() < HANG_UPS:
            wait = self.random.uniform(0, HANG_UP_SECONDS)
        try:
            outcome, got = await asyncio.wait_for(self.ask(messages), wait)
        except asyncio.TimeoutError:
            if not hangs_up:
                return "lost"
            self.hung_up += 1
            self.left.append(whole)
            return "hung up"
        if outcome != "answered":
            return outcome
        if got != expected:
            return "crosstalk"
        self.answered += 1
        self.kept, self.left = whole, []
        return "answered"

    async def ask(self, messages: list[Message]) -> tuple[Outcome, str]:
        """Send the conversation; return what came of it, and the reply."""
        streamed = self.random.random() < STREAMED
        body = {"model": "stub", "user": self.session_id, "messages": messages, "stream": streamed}
        status = None
        try:
            async with self.client.post(self.url / "v1/chat/completions", json=body) as response:
                status = response.status
                content = await response.read()
        except aiohttp.ClientError as error:
            self.tally.reported_as["cut off" if status == 200 else repr(error)] += 1
            # Without a word from the server the agent does not know: that is no report.
            return ("reported" if status == 200 else "lost"), ""
        if status != 200:
            self.tally.reported_as[f"{status} {_error(content)}"] += 1
            return "reported", ""
        reply = _streamed(content) if streamed else _whole(content)
        return ("lost", "") if reply is None else ("answered", reply)

    async def check(self) -> None:
        """See that each turn is kept that was answered, once, and no other.

        One that the agent hung up in may be kept: once, too. It may not be over yet.
        """
        # Where several are wrong, there is nothing to wait for in all others.
        patience = SETTLE_SECONDS if len(self.tally.wrong) < 3 else 0
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            async with self.client.get(self.url) as response:
                document = await response.json()
            turns, messages = document["turns"], document["messages"]
            at_rest = messages in (self.kept, *self.left)
            if at_rest and self.answered <= turns <= self.answered + self.hung_up:
                return
            if asyncio.get_running_loop().time() > deadline:
                self.tally.wrong.append(
                    f"{self.session_id}: {turns} turns, where {self.answered} were answered and "
                    f"{self.hung_up} hung up; the last messages are {messages[-2:]}"
                )
                return
            await asyncio.sleep(0.02)


def _whole(content: bytes) -> str | None:
    try:
        text: str = json.loads(content)["choices"][0]["message"]["content"]
    except (LookupError, TypeError, ValueError):
        return None
    return text


def _streamed(content: bytes) -> str | None:
    """Return the text of a stream, None where its end is not there."""
    text = ""
    try:
        for line in content.splitlines():
            if line == b"data: [DONE]":
                return text
            if line.startswith(b"data: "):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    except (LookupError, TypeError, ValueError):
        pass
    return None


def _error(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        return str(error.get("code") or error.get("message"))
    except (LookupError, TypeError, ValueError):
        return content.decode(errors="replace")[:60]

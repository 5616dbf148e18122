"""Agents that play sessions, hang up now and then, and check what the session server kept."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

import aiohttp
from yarl import URL

from .servers import Restartable
from .worker import reply_text

Message = dict[str, str]
Outcome = Literal["answered", "reported", "hung up", "lost", "crosstalk"]
ErrorKind = Literal["cut off", "gateway's", "other"]

WAIT_SECONDS = 120  # for an answer: after that it is lost
SETTLE_SECONDS = 30  # until a transcript must be right
HANG_UP_SECONDS = 0.1  # the longest that an agent which is to hang up waits for its answer
HANG_UPS = 0.02  # the share of the turns that an agent hangs up in
PAUSE_SECONDS = 1  # of an agent that was told of an error: else it would play on into an outage
STREAMED = 0.5  # the share of the turns that are streamed
GATEWAYS_OWN = "X-SMG-Error-Code"  # a header of the errors that come from no worker


class Report(NamedTuple):
    """A turn whose agent was told of an error, and when it was under way."""

    user: str
    text: str
    error: ErrorKind
    """The connection broke when part of the answer was there, or the gateway calls it its own."""

    since: float
    until: float


@dataclass(slots=True)
class Tally:
    """What came of the turns of all agents."""

    turns: Counter[str] = field(default_factory=Counter)
    reported_as: Counter[str] = field(default_factory=Counter)
    reports: list[Report] = field(default_factory=list)
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
    server: Restartable[Any]
    session_id: str
    random: Random
    tally: Tally
    said: list[Message] = field(default_factory=list)
    """The conversation up to the last turn that was answered."""

    kept: list[Message] = field(default_factory=list)
    """The conversation as the session server must have it: after a kill it begins with none."""

    turns: int = 0
    """How many turns the session server must have kept."""

    left: list[Message] | None = None
    """The conversation of the turn just hung up in, with its reply: it may be kept, too."""

    kills: int = 0
    """How often the session server had been killed when it made the session."""

    @property
    def url(self) -> URL:
        """Where its session is."""
        return self.server.url / "sessions" / self.session_id

    async def play(self, turns: int) -> None:
        """Play a session from its beginning to its end."""
        await self.begin()
        for number in range(turns):
            self.tally.begin()
            outcome = await self.turn(f"turn {number}")
            self.tally.end(outcome)
            if outcome == "reported":
                await asyncio.sleep(PAUSE_SECONDS)
            if outcome != "answered":
                await self.check()
        await self.check()
        await self.call("DELETE", self.url)

    async def begin(self) -> None:
        """Make the session; the session server has nothing of it."""
        self.kept, self.turns, self.left = [], 0, None
        self.kills = self.server.kills
        await self.call("POST", self.server.url / "sessions", {"session_id": self.session_id})

    async def turn(self, text: str) -> Outcome:
        """Play a turn; return what came of it."""
        messages = [*self.said, {"role": "user", "content": text}]
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
            self.left = whole
            return "hung up"
        if outcome != "answered":
            return outcome
        if got != expected:
            return "crosstalk"
        self.said, self.kept, self.turns = whole, whole, self.turns + 1
        return "answered"

    async def ask(self, messages: list[Message]) -> tuple[Outcome, str]:
        """Send the conversation; return what came of it, and the reply."""
        streamed = self.random.random() < STREAMED
        body = {"model": "stub", "user": self.session_id, "messages": messages, "stream": streamed}
        status, since = None, time.monotonic()
        try:
            async with self.client.post(self.url / "v1/chat/completions", json=body) as response:
                status = response.status
                content = await response.read()
        except aiohttp.ClientError as error:
            # A connection that breaks without a word tells an agent only that the server is gone.
            if status != 200 and not self.server.was_down(since, time.monotonic()):
                return "lost", ""
            if status == 200:
                return self.report(messages, since, "cut off", "cut off")
            return self.report(messages, since, "other", type(error).__name__)
        if status != 200:
            kind: ErrorKind = "gateway's" if GATEWAYS_OWN in response.headers else "other"
            return self.report(messages, since, kind, f"{status} {_error(content)}")
        reply = _streamed(content) if streamed else _whole(content)
        return ("lost", "") if reply is None else ("answered", reply)

    def report(
        self, messages: list[Message], since: float, error: ErrorKind, text: str
    ) -> tuple[Outcome, str]:
        """Note an error that the agent was told of."""
        self.tally.reported_as[text] += 1
        turn, until = messages[-1]["content"], time.monotonic()
        self.tally.reports.append(Report(self.session_id, turn, error, since, until))
        return "reported", ""

    async def call(self, method: str, url: URL, body: object = None) -> Any:
        """Return what the session server says of a session, None where a kill took that with it.

        A call that a kill breaks is made again.
        """
        while True:
            await self.server.up.wait()
            since = time.monotonic()
            try:
                async with self.client.request(method, url, json=body) as response:
                    if response.status == 404 and self.kills < self.server.kills:
                        return None
                    response.raise_for_status()
                    return json.loads(await response.read() or b"{}")
            except aiohttp.ClientError:
                if not self.server.was_down(since, time.monotonic()):
                    raise

    async def check(self) -> None:
        """See that each turn is kept that was answered, once, and no other.

        The turn just hung up in may not be over yet. Whether it is kept is read here; from now on
        it must be, or must not.
        """
        # Where several are wrong, there is nothing to wait for in all others.
        patience = SETTLE_SECONDS if len(self.tally.wrong) < 3 else 0
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            document = await self.call("GET", self.url)
            if document is None:
                await self.begin()
                return
            turns, messages = document["turns"], document["messages"]
            if messages == self.left and turns == self.turns + 1:
                self.kept, self.turns = messages, turns
            if messages == self.kept and turns == self.turns:
                self.left = None
                return
            if asyncio.get_running_loop().time() > deadline:
                self.tally.wrong.append(
                    f"{self.session_id}: {turns} turns instead of {self.turns}, or one more if it "
                    f"was just hung up in; the last messages are {messages[-2:]}"
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

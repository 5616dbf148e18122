"""Plays the sessions of both arms on the gateway, in one schedule."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar
from urllib.parse import quote

from yarl import URL

from ..gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER
from . import ask
from .call import CallError, Client, Reply
from .seen import ARMS, Arm, Counters, Failure, Outcome, Plan, Seen, Turn, with_cached_tokens

_FIRST_WORDS, _LATER_WORDS = 100, 25  # of the user, in a session's first turn and in each later one
_LAST = 1  # seconds at least for the counters at the end, without which the run may be in vain
_VOCABULARY = (
    "amber anchor basin birch breeze canyon cedar cloud copper coral delta drift ember fern field "
    "flint forest frost garden glacier granite harbor hazel island ivory juniper lagoon lantern "
    "maple marble meadow mist moss north oak ocean olive orchard pearl pebble pine plain quartz "
    "rain raven reef ridge river sand shadow shore silver slate snow spring stone storm summit "
    "thunder tide valley velvet willow winter"
)

T = TypeVar("T")


@dataclass(slots=True)
class _Session:
    """A session under way. A turn holds ``lock``, so that the turns come one after the other."""

    arm: Arm
    number: int
    session_id: str
    words: Random
    messages: list[dict[str, str]] = field(default_factory=list)
    worker: str | None = None
    created: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Play:
    """A run: ``seen`` is what it has seen so far, at any moment, also after it was cancelled.

    ``played`` is called with each turn. Calls go to the plan's gateway, its metrics and its session
    server, and nowhere else.
    """

    def __init__(
        self, plan: Plan, *, api_key: str | None, played: Callable[[Turn], None] = lambda turn: None
    ) -> None:
        self._seen = Seen(replace(plan, run=plan.run or secrets.token_hex(4)))
        self._turns: list[Turn] = []
        self._api_key = api_key
        self._played = played
        self._failed_in_a_row = 0
        self._deadline = 0.0

    @property
    def seen(self) -> Seen:
        """What has been seen so far."""
        return replace(self._seen, turns=with_cached_tokens(self._turns))

    async def run(self, ready: Callable[[Seen], None] = lambda seen: None) -> Seen:
        """Play the plan; ``ready`` is called when the gateway has answered and the calls begin."""
        begin = time.perf_counter()
        self._deadline = begin + self._seen.plan.time_limit
        try:
            async with Client(self._seen.plan.timeout, self._api_key) as client:
                if await self._in_time(self._prepare(client)):
                    before = await self._in_time(self._counters(client))
                    ready(self.seen)
                    if not self._seen.stopped:
                        await self._play(client)
                    if before:
                        after = await self._in_time(self._counters(client), _LAST)
                        self._see(counters=ask.growth(before, after))
        finally:
            self._see(seconds=time.perf_counter() - begin)
        return self.seen

    def _see(self, **changes: Any) -> None:
        self._seen = replace(self._seen, **changes)

    async def _in_time(self, lookup: Awaitable[T], least: float = 0) -> T | None:
        """Wait for ``lookup`` until the deadline, or ``least`` seconds; None where that is over."""
        try:
            left = self._deadline - time.perf_counter()
            return await asyncio.wait_for(lookup, max(least, left))
        except asyncio.TimeoutError:
            self._see(stopped="time_limit")
            return None

    async def _prepare(self, client: Client) -> bool:
        """Ask for the models and the workers; tell whether there is anything to play with."""
        plan = self._seen.plan
        try:
            self._see(models=await ask.models(client, plan.gateway))
        except CallError as error:
            # A gateway need not list its models: a name that the user gave is tried all the same.
            if plan.model is None or error.failure.kind in ("refused", "timeout"):
                self._see(failure=error.failure)
                return False
        model = plan.model or next(iter(self._seen.models or ()), None)
        if model is None:
            url = plan.gateway / "v1/models"
            self._see(failure=Failure("broken", url, text="it lists no model"))
            return False
        self._see(
            plan=replace(plan, model=model),
            workers=await ask.healthy_workers(client, plan.gateway, model),
        )
        return True

    async def _counters(self, client: Client) -> Counters | None:
        self._see(no_counters="no answer in time")
        try:
            counters = await ask.read_counters(client, self._seen.plan.metrics)
        except CallError as error:
            self._see(no_counters=error.failure.text or self._seen.no_counters)
            return None
        except (ValueError, IndexError) as error:  # the parser has both for odd lines
            self._see(no_counters=client.clean(str(error)))
            return None
        self._see(no_counters="")
        return counters

    async def _play(self, client: Client) -> None:
        """Play the schedule, ``concurrency`` calls at a time, to its end or the deadline."""
        plan = self._seen.plan
        schedule = _schedule(plan)
        players = [
            asyncio.ensure_future(self._player(client, schedule)) for _ in range(plan.concurrency)
        ]
        try:
            left = max(0.0, self._deadline - time.perf_counter())
            _, late = await asyncio.wait(players, timeout=left)
            if late:
                self._see(stopped="time_limit")
        finally:
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)
        for player in players:
            if not player.cancelled():
                player.result()  # a fault of this program is not to be passed over

    async def _player(self, client: Client, schedule: Iterator[tuple[_Session, int]]) -> None:
        limit = 2 * self._seen.plan.concurrency
        for session, number in schedule:
            async with session.lock:
                if self._failed_in_a_row >= limit:
                    self._see(stopped="failures")
                    return
                self._see(sent=self._seen.sent + 1)
                turn = await self._turn(client, session, number)
            self._failed_in_a_row = self._failed_in_a_row + 1 if turn.failure else 0
            self._turns.append(turn)
            self._played(turn)

    async def _turn(self, client: Client, session: _Session, number: int) -> Turn:
        """Say something and hear the answer; a turn that fails leaves no trace in the session."""
        said = {"role": "user", "content": _prompt(session, self._seen.plan.run)}
        try:
            reply = await self._call(client, session, [*session.messages, said])
        except CallError as error:
            return Turn(session.arm, session.number, number, "failed", failure=error.failure)
        session.messages += [said, {"role": "assistant", "content": reply.text}]
        outcome: Outcome
        if reply.worker is None:
            outcome = "unknown"
        elif session.worker is None:
            outcome = "first"
        else:
            outcome = "kept" if reply.worker == session.worker else "moved"
        session.worker = reply.worker or session.worker
        return Turn(
            session.arm,
            session.number,
            number,
            outcome,
            worker=reply.worker,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            first_token_seconds=reply.first_token_seconds,
        )

    async def _call(
        self, client: Client, session: _Session, messages: list[dict[str, str]]
    ) -> Reply:
        plan = self._seen.plan
        body = {
            "model": plan.model,
            "messages": messages,
            "max_tokens": plan.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if session.arm == "unkeyed":
            return await client.chat(plan.gateway / CHAT_COMPLETIONS[1:], body, {})
        if plan.through is None:
            headers: dict[str, str] = {ROUTING_KEY_HEADER: session.session_id}
            return await client.chat(plan.gateway / CHAT_COMPLETIONS[1:], body, headers)
        url = session_url(plan.through, session.session_id)
        try:
            return await client.chat(url / CHAT_COMPLETIONS[1:], body, {})
        except CallError as error:
            if error.failure.status != 404 or session.created:
                raise
            session.created = True
            self._see(sent_for_sessions=self._seen.sent_for_sessions + 1)
            try:
                await client.post(url.parent, {"session_id": session.session_id})
            except CallError:
                raise error from None
        self._see(sent_for_sessions=self._seen.sent_for_sessions + 1)
        return await client.chat(url / CHAT_COMPLETIONS[1:], body, {})


def session_url(through: str, session_id: str) -> URL:
    """Return the URL of a session at the session server; raises ``ValueError`` where it is none."""
    return URL(through.replace("{session_id}", quote(session_id, safe="")), encoded=True)


def _schedule(plan: Plan) -> Iterator[tuple[_Session, int]]:
    """Yield every turn of both arms: turn by turn, in pairs of one with the key and one without.

    The order is another one in each round. In a fixed one ``round_robin`` would look pinned: where
    the workers divide the calls of a round, each session meets the same worker every time.
    """
    random = _random(plan.run)
    ids = plan.session_ids()
    pairs = [
        [_Session(arm, number, session_id, _random(f"{plan.run} {arm} {number}")) for arm in ARMS]
        for number, session_id in enumerate(ids, 1)
    ]
    for number in range(1, plan.turns + 1):
        random.shuffle(pairs)
        for pair in pairs:
            random.shuffle(pair)
            for session in pair:
                yield session, number


def _random(seed: str) -> Random:
    return Random(seed)  # noqa: S311 - nothing here is a secret


def _prompt(session: _Session, run: str) -> str:
    """Return what the user says next. No two sessions begin alike: none warms another's cache."""
    words = session.words.choices(
        _VOCABULARY.split(), k=_LATER_WORDS if session.messages else _FIRST_WORDS
    )
    opening = "" if session.messages else f"{session.words.getrandbits(64):x} {run}: "
    return f"{opening}{' '.join(words)}. Go on."

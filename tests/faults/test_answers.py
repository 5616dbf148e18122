"""A gateway that gives bad answers of every kind, with and without the plugin.

It is the real gateway; either a server in front of it fails, or all its workers do.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from aiohttp.test_utils import TestClient, TestServer

from aiohttp_smg_routing.testing import Answer, Call, Recorder, answer, completion, redirect, stream
from harness.agents import Reply, chat
from harness.proxies import pinned_server

from ..turns import turns_of
from ..waiting import PATIENCE_SECONDS
from .failing import Failing, Fault, Well, Where, failing_gateway
from .serving import SESSIONS, watched_server

WHERE = pytest.mark.parametrize("where", ["the gateway", "its workers"])


@dataclass
class Faulty:
    """Fail every try of each session's even turns, and the first try of the turns after them.

    Each even turn has its own fault.
    """

    faults: Sequence[Fault]
    well: Well
    tries: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __call__(self, call: Call) -> Answer:
        body = call.json()
        session_id, number = body["user"], len(body["messages"])
        self.tries[session_id, number] += 1
        fails = number % 2 == 0 or (number > 1 and self.tries[session_id, number] == 1)
        return self.faults[number // 2 - 1](call) if fails else self.well(call)


def status(number: int) -> Fault:
    error = {"error": {"message": "not now", "code": "busy"}}
    return lambda call: answer(error, status=number, headers={"Retry-After": "0"})


async def hang_up(*pieces: bytes) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
    yield b""


async def reset(*pieces: bytes) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
    raise ConnectionResetError


WHOLE = completion("the whole of it")
# An engine answers so when it gets new weights during a turn.
MESSAGE = {"role": "assistant", "content": "half of it"}
ABORTED = answer({"choices": [{"index": 0, "message": MESSAGE, "finish_reason": "abort"}]})


class Bad(NamedTuple):
    """A fault, and the status that agents get if the gateway or its workers have it."""

    fault: Fault
    gateway: int
    workers: int
    tried_again: bool = True
    begins_well: tuple[Where, ...] = ()
    """The places whose answers have a head without a failure; the ledger judges by the head."""

    def failed(self, where: Where) -> int:
        """Return how many calls fail: three tries of a turn, and the first try of the next."""
        shows = self.tried_again and where not in self.begins_well
        return len(SESSIONS) * 4 if shows else 0


BAD = {
    "429": Bad(status(429), 429, 429),
    "500": Bad(status(500), 500, 500),
    "503": Bad(status(503), 503, 503),
    "half an answer": Bad(
        lambda call: hang_up(WHOLE[:-20]), 502, 500, begins_well=("the gateway",)
    ),
    "half a head": Bad(lambda call: hang_up(b"HTTP/1.1 200 OK\r\nContent-"), 502, 500),
    "no answer": Bad(lambda call: hang_up(), 502, 500),
    "no http": Bad(lambda call: hang_up(b"220 mail.example ESMTP\r\n\r\n"), 502, 500),
    "reset": Bad(lambda call: reset(), 502, 500),
    "reset in the midst": Bad(
        lambda call: reset(WHOLE[:-20]), 502, 500, begins_well=("the gateway",)
    ),
    "aborted": Bad(lambda call: ABORTED, 503, 503, begins_well=("the gateway", "its workers")),
    # The server doesn't retry after a redirect, and the gateway doesn't follow it.
    "redirect": Bad(lambda call: redirect("http://127.0.0.1:9/"), 307, 307, tried_again=False),
}


async def play(
    gateway: Failing, fault: Fault, turns: int, *, plugin: bool, failed: int = 0, **body: Any
) -> list[dict[str, Reply]]:
    """Play all sessions at once; return each agent's replies, turn by turn.

    ``failed`` is the number of calls that the ledger must count as failed.
    """
    gateway.forget()
    gateway.answer(fault)
    async with watched_server(gateway.url, plugin=plugin) as server:
        got = [await server.agents.all(turn, **body) for turn in range(1, turns + 1)]
        # Only answered turns are kept.
        kept = await server.agents.turns_kept()
        assert kept == {each: sum(turn[each].answered for turn in got) for each in SESSIONS}
        if plugin:  # each call counts once, whatever its outcome
            counted = server.pins.summary()
            answered = counted.first + counted.kept + counted.unknown
            calls = len(turns_of(*gateway.recorders))
            assert (counted.failed, answered) == (failed, calls - failed)
    gateway.assert_keys(plugin=plugin)
    for turn in got:
        others = {
            k: got.body for k, got in turn.items() if got.answered and quoted(k) not in got.body
        }
        assert others == {}, "an agent got the answer to another session"
    return got


def quoted(session_id: str) -> bytes:
    return f'"{session_id}"'.encode()


def statuses(turns: Sequence[dict[str, Reply]]) -> list[set[int | None]]:
    return [{got.status for got in turn.values()} for turn in turns]


@WHERE
@pytest.mark.parametrize("streamed", [False, True])
async def test_agents_get_the_same_of_a_gateway_that_fails(where: Where, streamed: bool) -> None:
    seen = []
    async with failing_gateway(where) as gateway:
        for plugin in (True, False):
            faulty = Faulty([bad.fault for bad in BAD.values()], gateway.well)
            turns, failed = 1 + 2 * len(BAD), sum(bad.failed(where) for bad in BAD.values())
            got = await play(gateway, faulty, turns, plugin=plugin, failed=failed, stream=streamed)
            seen.append(statuses(got))
    told = [bad.gateway if where == "the gateway" else bad.workers for bad in BAD.values()]
    expected = [{200}]
    for bad, status in zip(BAD.values(), told, strict=True):
        expected += [{status}, {200 if bad.tried_again else status}]
    assert seen[0] == seen[1] == expected


@dataclass
class HalfAStream:
    """Stream half of each second turn; fail once the agents have seen that half."""

    fault: str
    well: Well
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, call: Call) -> Answer:
        return self.half() if len(call.json()["messages"]) == 2 else self.well(call)

    async def half(self) -> AsyncGenerator[bytes, None]:
        pieces = stream("half", "of it")
        yield await anext(pieces) + await anext(pieces)
        await pieces.aclose()
        await self.seen.wait()
        if self.fault == "falls silent":
            await self.over.wait()
        if self.fault == "has an error in it":
            yield b"f\r\ndata: {broken\n\n\r\n0\r\n\r\n"
        if self.fault == "is aborted":
            event = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}\n\n'
            end = event + b"data: [DONE]\n\n"
            yield b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end)
        if self.fault == "is reset":
            raise ConnectionResetError
        yield b""


async def fail_in_a_stream(
    gateway: Failing, failing: HalfAStream, *, plugin: bool, timeout: float
) -> list[dict[str, Reply]]:
    """Play three turns of each session; the second fails once all agents have a piece of it."""
    gateway.forget()
    gateway.answer(failing)
    async with watched_server(gateway.url, plugin=plugin, timeout_seconds=timeout) as server:
        agents = server.agents
        turns = [await agents.all(1, stream=True)]
        async with agents.begun(2, stream=True) as under_way:
            failing.seen.set()
        turns.append(await under_way)
        failing.over.set()
        turns.append(await agents.all(3, stream=True))
        assert await agents.turns_kept() == dict.fromkeys(SESSIONS, 2)
    gateway.assert_keys(plugin=plugin)
    return turns


@WHERE
async def test_agents_get_the_same_of_a_stream_that_fails(where: Where) -> None:
    async with failing_gateway(where) as gateway:
        for fault in ("breaks off", "is reset", "has an error in it", "falls silent", "is aborted"):
            seen = []
            for plugin in (True, False):
                failing = HalfAStream(fault, gateway.well)
                timeout = 5 if fault == "falls silent" else PATIENCE_SECONDS
                try:
                    turns = await fail_in_a_stream(gateway, failing, plugin=plugin, timeout=timeout)
                finally:
                    failing.seen.set()
                    failing.over.set()
                whole = [{got.whole for got in turn.values()} for turn in turns]
                assert whole == [{True}, {False}, {True}], fault
                seen.append(statuses(turns))
            assert seen[0] == seen[1], fault


@dataclass
class Slow:
    """Answer once a call of each session is under way, one after another, the last one first."""

    well: Well
    waiting: list[asyncio.Event] = field(default_factory=list)

    async def __call__(self, call: Call) -> AsyncGenerator[bytes, None]:
        self.waiting.append(mine := asyncio.Event())
        if len(self.waiting) == len(SESSIONS):
            mine.set()
        await mine.wait()
        self.waiting.remove(mine)
        if self.waiting:
            self.waiting[-1].set()
        async for piece in self.well(call):
            yield piece

    def give_up(self) -> None:
        for event in self.waiting:
            event.set()


@WHERE
async def test_agents_get_the_same_of_a_gateway_that_is_slow(where: Where) -> None:
    async with failing_gateway(where) as gateway:
        for plugin in (True, False):
            slow = Slow(gateway.well)
            try:
                turns = await play(gateway, slow, 4, plugin=plugin)
            finally:
                slow.give_up()
            assert statuses(turns) == [{200}] * 4


@WHERE
async def test_no_key_follows_a_redirect_to_elsewhere(where: Where, elsewhere: Recorder) -> None:
    """A naive proxy lets aiohttp follow the redirect, and passes on the answer from there."""
    async with failing_gateway(where) as gateway:
        for plugin in (True, False):
            gateway.forget()
            gateway.answer(Faulty([lambda call: redirect(elsewhere.chat)], gateway.well))
            app = pinned_server(gateway.url, enabled=plugin)
            async with TestClient(TestServer(app)) as client:

                async def turn(session_id: str, number: int) -> int:
                    path = f"/sessions/{session_id}/v1/chat/completions"
                    async with client.post(path, json=chat(session_id, number)) as response:
                        return int(response.status)

                for number in (1, 2, 3):
                    turns = (turn(session_id, number) for session_id in SESSIONS)
                    assert set(await asyncio.gather(*turns)) == {200}
            gateway.assert_keys(plugin=plugin)
            assert len(turns_of(*gateway.recorders)) == len(SESSIONS) * 3
    assert len(elsewhere.calls) == len(SESSIONS) * 2 * 2
    assert {*map(tuple, (call.keys for call in elsewhere.calls))} == {()}

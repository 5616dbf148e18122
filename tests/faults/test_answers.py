"""A gateway that answers as badly as a gateway can, with the plugin and without."""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    answer,
    canned,
    completion,
    recording_gateway,
    redirect,
    stream,
)
from aiohttp_smg_routing.testing.call import read_call

from .. import conftest
from ..workers import chat
from .serving import SESSIONS, Got, assert_keys, session_server

Fault = Callable[[Call], Answer]
TURNS = 4


@dataclass
class Faulty:
    """Fail in every try of each session's second turn, and in the first try of its third."""

    fault: Fault
    tries: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __call__(self, call: Call) -> Answer:
        return self.fault(call) if self.fails(call) else canned(call)

    def fails(self, call: Call) -> bool:
        body = call.json()
        turn = body["user"], len(body["messages"])
        self.tries[turn] += 1
        return turn[1] == 2 or (turn[1] == 3 and self.tries[turn] == 1)


def status(number: int) -> Fault:
    error = {"error": {"message": "not now", "code": "busy"}}
    return lambda call: answer(error, status=number, headers={"Retry-After": "0"})


async def hang_up(*pieces: bytes) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
    yield b""


def half_an_answer(call: Call) -> Answer:
    return hang_up(completion("the whole of it")[:-20])


def half_a_head(call: Call) -> Answer:
    return hang_up(b"HTTP/1.1 200 OK\r\nContent-")


def no_answer(call: Call) -> Answer:
    return hang_up()


def no_http(call: Call) -> Answer:
    return hang_up(b"220 mail.example ESMTP\r\n\r\n")


Outcome = dict[str, list[Got]]


async def play(gateway: Recorder, *, plugin: bool, **body: Any) -> Outcome:
    """Play all sessions at once; return what each agent got, turn by turn."""
    async with session_server(gateway.url, plugin=plugin) as server:
        turns = [await server.agents.all(turn, **body) for turn in range(1, TURNS + 1)]
        outcome = {each: [turn[each] for turn in turns] for each in SESSIONS}
        # Answered turns are kept, and no others.
        kept = await server.agents.turns_kept()
        assert kept == {k: sum(got.answered for got in v) for k, v in outcome.items()}
        calls = sum(call.method == "POST" for call in gateway.calls)
        counted = server.pins.summary()
        if plugin:  # each call once, whatever came of it
            assert counted.failed + counted.unknown == calls
    assert_keys(gateway.calls, plugin=plugin)
    return outcome


async def with_and_without(fault: Fault, **body: Any) -> Outcome:
    """Play the same fault in both arms; the agents get the same."""
    outcomes = []
    for plugin in (True, False):
        async with recording_gateway() as gateway:
            gateway.answer = Faulty(fault)
            outcomes.append(await play(gateway, plugin=plugin, **body))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.mark.parametrize(
    ("fault", "reported"),
    [
        (status(429), 429),
        (status(500), 500),
        (status(503), 503),
        (half_an_answer, 502),
        (half_a_head, 502),
        (no_answer, 502),
        (no_http, 502),
    ],
    ids=["429", "500", "503", "half an answer", "half a head", "no answer", "no http"],
)
async def test_agents_get_the_same_of_a_gateway_that_fails(fault: Fault, reported: int) -> None:
    for turns in (await with_and_without(fault)).values():
        assert [got.status for got in turns] == [200, reported, 200, 200]


@dataclass
class HalfAStream:
    """Stream each second turn to its half; what then comes waits until the agents have seen it."""

    fault: str
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, call: Call) -> Answer:
        return self.half() if len(call.json()["messages"]) == 2 else canned(call)

    async def half(self) -> AsyncGenerator[bytes, None]:
        pieces = stream("half", "of it")
        yield await anext(pieces) + await anext(pieces)
        await pieces.aclose()
        await self.seen.wait()
        if self.fault == "falls silent":
            await self.over.wait()
        if self.fault == "has an error in it":
            yield b"f\r\ndata: {broken\n\n\r\n0\r\n\r\n"
        yield b""


async def fail_in_a_stream(
    gateway: Recorder, failing: HalfAStream, *, plugin: bool, timeout: float
) -> list[dict[str, Got]]:
    """Play three turns of each session; the second fails when all agents have a piece of it."""
    async with session_server(gateway.url, plugin=plugin, timeout_seconds=timeout) as server:
        agents = server.agents
        turns = [await agents.all(1, stream=True)]
        async with agents.begun(2, stream=True) as under_way:
            failing.seen.set()
        turns.append(await under_way)
        failing.over.set()
        turns.append(await agents.all(3, stream=True))
        assert await agents.turns_kept() == dict.fromkeys(SESSIONS, 2)
    return turns


@pytest.mark.parametrize(
    ("fault", "timeout"),
    [("breaks off", 30.0), ("has an error in it", 30.0), ("falls silent", 1.5)],
)
async def test_agents_get_the_same_of_a_stream_that_fails(fault: str, timeout: float) -> None:
    outcomes = []
    for plugin in (True, False):
        async with recording_gateway() as gateway:
            gateway.answer = failing = HalfAStream(fault)
            try:
                turns = await fail_in_a_stream(gateway, failing, plugin=plugin, timeout=timeout)
            finally:
                failing.seen.set()
                failing.over.set()
            assert_keys(gateway.calls, plugin=plugin)
        assert [{got.whole for got in turn.values()} for turn in turns] == [{True}, {False}, {True}]
        outcomes.append([[got.status for got in turn.values()] for turn in turns])
    assert outcomes[0] == outcomes[1]


@asynccontextmanager
async def resetting_gateway(resets: Callable[[Call], bool]) -> AsyncIterator[Recorder]:
    """Run a gateway that resets a connection, where a recorder can do no more than close it."""
    connections: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                call = await read_call(reader, writer)
                recorder.calls.append(call)
                if resets(call):
                    opened = writer.get_extra_info("socket")
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                writer.write(completion())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    recorder = Recorder(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        yield recorder
    finally:
        server.close()
        await server.wait_closed()


async def test_agents_get_the_same_of_a_gateway_that_resets_connections() -> None:
    outcomes = []
    for plugin in (True, False):
        async with resetting_gateway(Faulty(canned).fails) as gateway:
            outcomes.append(await play(gateway, plugin=plugin))
    assert outcomes[0] == outcomes[1]
    for turns in outcomes[0].values():
        assert [got.status for got in turns] == [200, 502, 200, 200]


@dataclass
class Slow:
    """Answer when a call of each session is under way: the last one first, each after another."""

    waiting: list[asyncio.Event] = field(default_factory=list)

    async def __call__(self, call: Call) -> AsyncGenerator[bytes, None]:
        self.waiting.append(mine := asyncio.Event())
        if len(self.waiting) == len(SESSIONS):
            mine.set()
        await mine.wait()
        self.waiting.remove(mine)
        if self.waiting:
            self.waiting[-1].set()
        yield completion(call.json()["user"])

    def give_up(self) -> None:
        for event in self.waiting:
            event.set()


async def test_agents_get_the_same_of_a_gateway_that_is_slow() -> None:
    outcomes = []
    for plugin in (True, False):
        async with recording_gateway() as gateway:
            gateway.answer = slow = Slow()
            try:
                outcomes.append(await play(gateway, plugin=plugin))
            finally:
                slow.give_up()
    assert outcomes[0] == outcomes[1]
    for session_id, turns in outcomes[0].items():
        assert all(got.status == 200 and session_id.encode() in got.body for got in turns)


async def test_agents_get_the_redirect_of_the_gateway_and_its_target_nothing(
    elsewhere: Recorder,
) -> None:
    outcome = await with_and_without(lambda call: redirect(elsewhere.chat))
    for turns in outcome.values():
        # It is no failure that the server tries again.
        assert [got.status for got in turns] == [200, 307, 307, 200]
    assert elsewhere.calls == []


async def test_no_key_follows_a_redirect_to_elsewhere(elsewhere: Recorder) -> None:
    statuses = []
    for enabled in (True, False):
        async with recording_gateway() as gateway:
            gateway.answer = Faulty(lambda call: redirect(elsewhere.chat))
            app = conftest.session_server(gateway.url, enabled=enabled)
            async with TestClient(TestServer(app)) as client:

                async def turn(session_id: str, number: int) -> int:
                    path = f"/sessions/{session_id}/v1/chat/completions"
                    async with client.post(path, json=chat(session_id, number)) as response:
                        return int(response.status)

                for number in range(1, TURNS + 1):
                    turns = (turn(session_id, number) for session_id in SESSIONS)
                    statuses.append((enabled, set(await asyncio.gather(*turns))))
            assert_keys(gateway.calls, plugin=enabled)
            assert len(gateway.calls) == len(SESSIONS) * TURNS
    assert statuses == [(enabled, {200}) for enabled in (True, False) for _ in range(TURNS)]
    assert len(elsewhere.calls) == len(SESSIONS) * 2 * 2
    assert {*map(tuple, (call.keys for call in elsewhere.calls))} == {()}

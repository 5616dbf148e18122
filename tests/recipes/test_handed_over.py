"""A turn that a queue hands to another task: the problem and both remedies."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import nullcontext
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import ROUTING, current_session_id, in_session, routing_session, setup
from aiohttp_smg_routing.testing import Recorder, StartSmgGateway
from harness.agents import CHAT, chat

from ..turns import answered, turns_of
from .serving import SESSIONS, TURNS, assert_all_pinned, play_asks

REMEDIES = pytest.mark.parametrize("remedy", ["in_session", "routing_session"])
STARTS = pytest.mark.parametrize("started", ["by the app", "by the first request"])


class Server:
    """Hands each turn to one task, and waits for the answer that the task got."""

    def __init__(self, gateway: URL, started: str, remedy: str = "") -> None:
        self.gateway, self.remedy = gateway, remedy
        self.is_lazy = started == "by the first request"
        self.queue: asyncio.Queue[tuple[str | None, Awaitable[Any], asyncio.Future[Any]]]
        self.task: asyncio.Task[None] | None = None
        self.played, self.may_end = asyncio.Event(), asyncio.Event()
        self.may_end.set()
        self.app = web.Application()
        self.app.cleanup_ctx.append(self.running)
        self.app.router.add_post("/sessions/{session_id}/ask", self.ask)
        setup(self.app, {"gateway": str(gateway), "instrument": True})

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        self.queue = asyncio.Queue()
        async with ClientSession() as self.session:
            if not self.is_lazy:
                self.task = asyncio.create_task(self.work())
            yield
            if self.task:
                self.task.cancel()
                await asyncio.wait([self.task])

    async def work(self) -> None:
        while True:
            session_id, job, done = await self.queue.get()
            with routing_session(session_id) if session_id else nullcontext():
                done.set_result(await job)

    async def call(self, body: dict[str, Any]) -> Any:
        async with self.session.post(self.gateway / CHAT, json=body) as answer:
            return await answer.json()

    async def ask(self, request: web.Request) -> web.Response:
        job: Coroutine[Any, Any, Any] = self.call(await request.json())
        if self.remedy == "in_session":
            job = in_session(job)
        session_id = current_session_id() if self.remedy == "routing_session" else None
        if self.task is None:
            self.task = asyncio.create_task(self.work())
        done: asyncio.Future[Any] = asyncio.Future()
        self.queue.put_nowait((session_id, job, done))
        answer = await done
        self.played.set()
        await self.may_end.wait()
        return web.json_response(answer)


async def test_a_task_of_the_app_has_no_session(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    server = Server(recording_gateway.url, "by the app")
    await play_asks((await aiohttp_client(server.app)).make_url("/"), stream=False)
    turns = turns_of(recording_gateway)
    assert [call.keys for call in turns] == [[]] * len(SESSIONS) * TURNS
    assert server.app[ROUTING].pins.summary().missing == len(turns)


async def test_a_task_of_the_first_request_sends_its_key_for_all_and_that_is_late(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    server = Server(recording_gateway.url, "by the first request")
    client = await aiohttp_client(server.app)
    for session_id in ("s-0", "s-1", "s-2"):
        await answered(client, f"/sessions/{session_id}/ask", json=chat(session_id))
    turns = turns_of(recording_gateway)
    assert [(call.json()["user"], call.keys) for call in turns] == [
        ("s-0", [b"s-0"]),
        ("s-1", [b"s-0"]),
        ("s-2", [b"s-0"]),
    ]
    assert server.app[ROUTING].pins.summary().late == 2


async def test_while_the_first_request_runs_nothing_shows_it(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    server = Server(recording_gateway.url, "by the first request")
    client = await aiohttp_client(server.app)
    server.may_end.clear()

    async def play(session_id: str) -> None:
        await answered(client, f"/sessions/{session_id}/ask", json=chat(session_id))

    first = asyncio.create_task(play("s-0"))
    await server.played.wait()
    server.played.clear()
    second = asyncio.create_task(play("s-1"))
    await server.played.wait()
    late = server.app[ROUTING].pins.summary().late
    server.may_end.set()
    await asyncio.gather(first, second)
    assert [call.keys for call in turns_of(recording_gateway)] == [[b"s-0"]] * 2
    assert late == 0


@REMEDIES
@STARTS
async def test_a_turn_that_is_handed_over_with_its_session_carries_its_key(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient, started: str, remedy: str
) -> None:
    server = Server(recording_gateway.url, started, remedy)
    await play_asks((await aiohttp_client(server.app)).make_url("/"), stream=False)
    assert_all_pinned(recording_gateway)
    summary = server.app[ROUTING].pins.summary()
    assert (summary.late, summary.missing) == (0, 0)


@REMEDIES
@STARTS
async def test_and_stays_on_one_worker(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient, started: str, remedy: str
) -> None:
    smg = await smg_gateway(3, policy="manual")
    server = Server(smg.url, started, remedy)
    await play_asks((await aiohttp_client(server.app)).make_url("/"), stream=False)
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS)
    count = len(SESSIONS)
    assert +await smg.branches() == {"vacant": count, "occupied_hit": count * (TURNS - 1)}

"""Agents that hang up, cancelled handlers and time-outs, with and without the plugin."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from aiohttp_smg_routing import ROUTING, setup
from aiohttp_smg_routing.testing import Answer, Call, SmgGateway, smg_gateway
from harness.agents import CHAT, Reply, chat
from harness.proxies import CLIENT, client_session

from ..turns import assert_keys, turns_of
from ..waiting import soon, until
from .serving import SESSIONS, holding, running_tasks, watched_server

LEAVING = SESSIONS[::2]
STAYING = SESSIONS[1::2]


@asynccontextmanager
async def gateway_that_holds() -> AsyncIterator[tuple[SmgGateway, asyncio.Event]]:
    """Run the real gateway; its workers hold each second turn until the event is set."""
    async with smg_gateway(3, policy="manual") as smg:
        with holding(*smg.workers) as release:
            yield smg, release


async def play_and_hang_up(
    smg: SmgGateway, release: asyncio.Event, *, plugin: bool, stream: bool
) -> list[dict[str, Reply]]:
    """Play three turns of each session; half of the agents hang up during the second."""
    async with watched_server(smg.url, plugin=plugin) as server:
        agents = server.agents
        turns = [await agents.all(1)]
        second, pieces = agents.start(2, stream=stream)
        await until(lambda: len(turns_of(*smg.workers)) == 2 * len(SESSIONS))
        if stream:  # each agent has a piece of its answer
            await soon(asyncio.gather(*(piece.wait() for piece in pieces)))
        for each in LEAVING:
            second[each].cancel()
        # Exactly their calls have ended.
        await until(lambda: server.calls_under_way == len(STAYING))
        release.set()
        turns.append({each: await soon(second[each]) for each in STAYING})
        turns.append(await agents.all(3))
        kept = await agents.turns_kept()
        assert kept == dict.fromkeys(LEAVING, 2) | dict.fromkeys(STAYING, 3)
        if plugin:
            counted = server.pins.summary()
            assert (counted.first, counted.moved) == (len(SESSIONS), 0)
            # A stream that has begun has named its worker.
            assert counted.failed == (0 if stream else len(LEAVING))
            assert counted.failed + counted.kept == 2 * len(SESSIONS)
    return turns


@pytest.mark.parametrize("stream", [False, True])
async def test_agents_that_hang_up_take_nothing_of_others_with_them(stream: bool) -> None:
    outcomes = []
    for plugin in (True, False):
        async with gateway_that_holds() as (smg, release):
            outcomes.append(await play_and_hang_up(smg, release, plugin=plugin, stream=stream))
            assert_keys(turns_of(*smg.workers), plugin=plugin)
    assert outcomes[0] == outcomes[1]
    assert {got.status for turn in outcomes[0] for got in turn.values()} == {200}


async def test_agents_get_the_same_of_a_time_out() -> None:
    outcomes = []
    for plugin in (True, False):
        async with (
            gateway_that_holds() as (smg, release),
            watched_server(smg.url, plugin=plugin, timeout_seconds=5, retries=0) as server,
        ):
            turns = [await server.agents.all(1), await server.agents.all(2)]
            release.set()
            turns.append(await server.agents.all(3))
            assert await server.agents.turns_kept() == dict.fromkeys(SESSIONS, 2)
            assert_keys(turns_of(*smg.workers), plugin=plugin)
            if plugin:
                counted = server.pins.summary()
                assert counted.first == counted.failed == counted.kept == len(SESSIONS)
            outcomes.append(turns)
    assert outcomes[0] == outcomes[1]
    assert [{got.status for got in turn.values()} for turn in outcomes[0]] == [{200}, {504}, {200}]


def impatient_server(gateway: URL, **config: object) -> web.Application:
    """Return a server whose handler cancels its call, in each possible way, and then retries.

    Both calls are made in the same request.
    """
    app = web.Application()

    async def handler(request: web.Request) -> web.Response:
        session_id, way = request.match_info["session_id"], request.match_info["way"]
        client = request.app[CLIENT]
        request.app[ARRIVED][session_id] = asyncio.Event()
        chat_url = gateway / CHAT

        async def call(turn: int, **more: ClientTimeout) -> int:
            async with client.post(chat_url, json=chat(session_id, turn), **more) as response:
                return response.status

        with suppress(asyncio.CancelledError, asyncio.TimeoutError):
            if way == "cancel":
                task = asyncio.create_task(call(2))
                await request.app[ARRIVED][session_id].wait()
                task.cancel()
                await task
            elif way == "wait_for":
                await asyncio.wait_for(call(2), 1)
            else:
                await call(2, timeout=ClientTimeout(total=1))
            return web.Response(status=500, text="it was answered")
        return web.Response(status=await call(3))

    app.cleanup_ctx.append(client_session)
    app.router.add_post("/{way}/{session_id}", handler)
    app[ARRIVED] = {}
    setup(app, {"gateway": str(gateway), "client_session": "client", **config})
    return app


ARRIVED = web.AppKey("arrived", dict[str, asyncio.Event])
WAYS = ("cancel", "wait_for", "timeout")


async def give_up(smg: SmgGateway, release: asyncio.Event, *, enabled: bool) -> list[int]:
    app, held = impatient_server(smg.url, enabled=enabled), smg.workers[0].answer

    def answer(call: Call) -> Answer:
        if call.method == "POST":
            app[ARRIVED][call.json()["user"]].set()
        return held(call)

    for worker in smg.workers:
        worker.answer = answer
    before = running_tasks()
    async with TestClient(TestServer(app)) as client:

        async def turn(way: str, session_id: str) -> int:
            async with client.post(f"/{way}/{session_id}") as response:
                return int(response.status)

        sessions = [(way, f"{way}-{each}") for way in WAYS for each in SESSIONS]
        statuses = await soon(asyncio.gather(*(turn(*each) for each in sessions)))
        connector = app[CLIENT].connector
        assert connector is not None
        await until(lambda: not connector._acquired)
        pins = app[ROUTING].pins
        counted = pins.summary()
        if enabled:
            assert (counted.failed, counted.first) == (len(sessions), len(sessions))
        pinned = {pin.session for pin in pins.sessions()}
        assert pinned == ({each for _, each in sessions} if enabled else set())
    release.set()
    await until(lambda: running_tasks() <= before)
    return statuses


async def test_calls_that_a_handler_gives_up_leave_the_next_one_its_key() -> None:
    outcomes = []
    for enabled in (True, False):
        async with gateway_that_holds() as (smg, release):
            outcomes.append(await give_up(smg, release, enabled=enabled))
            assert_keys(turns_of(*smg.workers), plugin=enabled)
    assert outcomes[0] == outcomes[1] == [200] * len(SESSIONS) * len(WAYS)

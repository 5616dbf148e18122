"""Agents that hang up, handlers that are cancelled, time-outs: with the plugin and without."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

from aiohttp import ClientSession, ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from aiohttp_smg_routing import PINS, setup
from aiohttp_smg_routing.testing import Answer, Call, Recorder, recording_gateway

from ..conftest import CLIENT
from ..workers import chat
from .serving import SESSIONS, Got, assert_keys, holding, session_server, soon, turns_of, until

LEAVING = SESSIONS[::2]
STAYING = SESSIONS[1::2]


async def hang_up(
    gateway: Recorder, release: asyncio.Event, *, plugin: bool
) -> list[dict[str, Got]]:
    """Play three turns of each session; half of the agents leave in the midst of the second."""
    async with session_server(gateway.url, plugin=plugin) as server:
        agents = server.agents
        turns = [await agents.all(1)]
        second = {each: asyncio.create_task(agents.by_id[each].turn(2)) for each in SESSIONS}
        await until(lambda: len(turns_of(gateway)) == 2 * len(SESSIONS))
        for each in LEAVING:
            second[each].cancel()
        # Their calls have left the gateway, and only theirs.
        await until(lambda: server.calls_under_way == len(STAYING))
        release.set()
        turns.append({each: await soon(second[each]) for each in STAYING})
        turns.append(await agents.all(3))
        kept = await agents.turns_kept()
        assert kept == dict.fromkeys(LEAVING, 2) | dict.fromkeys(STAYING, 3)
        counted = server.pins.summary()
        if plugin:
            assert counted.failed == len(LEAVING)
            assert counted.unknown == len(SESSIONS) * 3 - len(LEAVING)
    return turns


async def test_agents_that_hang_up_take_nothing_of_others_with_them() -> None:
    outcomes = []
    for plugin in (True, False):
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(recording_gateway())
            release = stack.enter_context(holding(gateway))
            outcomes.append(await hang_up(gateway, release, plugin=plugin))
            assert_keys(gateway.calls, plugin=plugin)
    assert outcomes[0] == outcomes[1]
    assert {got.status for turn in outcomes[0] for got in turn.values()} == {200}


async def test_agents_get_the_same_of_a_time_out() -> None:
    outcomes = []
    for plugin in (True, False):
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(recording_gateway())
            release = stack.enter_context(holding(gateway))
            async with session_server(
                gateway.url, plugin=plugin, timeout_seconds=1.5, retries=0
            ) as server:
                turns = [await server.agents.all(1), await server.agents.all(2)]
                release.set()
                turns.append(await server.agents.all(3))
                assert await server.agents.turns_kept() == dict.fromkeys(SESSIONS, 2)
                if plugin:
                    assert server.pins.summary().failed == len(SESSIONS)
            assert_keys(gateway.calls, plugin=plugin)
            outcomes.append(turns)
    assert outcomes[0] == outcomes[1]
    assert [{got.status for got in turn.values()} for turn in outcomes[0]] == [{200}, {504}, {200}]


def impatient_server(gateway: URL, **config: object) -> web.Application:
    """Return a server whose handler gives its call up, in each way there is, and then tries again.

    The second call is made after the first was cancelled, in the same request.
    """
    app = web.Application()

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield

    async def handler(request: web.Request) -> web.Response:
        session_id, way = request.match_info["session_id"], request.match_info["way"]
        client = request.app[CLIENT]
        request.app[ARRIVED][session_id] = asyncio.Event()
        chat_url = gateway / "v1/chat/completions"

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
                await asyncio.wait_for(call(2), 0.1)
            else:
                await call(2, timeout=ClientTimeout(total=0.1))
            return web.Response(status=500, text="it was answered")
        return web.Response(status=await call(3))

    app.cleanup_ctx.append(client_session)
    app.router.add_post("/{way}/{session_id}", handler)
    app[ARRIVED] = {}
    setup(app, {"gateway": str(gateway), "client_session": "client", **config})
    return app


ARRIVED = web.AppKey("arrived", dict[str, asyncio.Event])
WAYS = ("cancel", "wait_for", "timeout")


async def give_up(gateway: Recorder, release: asyncio.Event, *, enabled: bool) -> list[int]:
    app, held = impatient_server(gateway.url, enabled=enabled), gateway.answer

    def answer(call: Call) -> Answer:
        app[ARRIVED][call.json()["user"]].set()
        return held(call)

    gateway.answer = answer
    before = asyncio.all_tasks()
    async with TestClient(TestServer(app)) as client:

        async def turn(way: str, session_id: str) -> int:
            async with client.post(f"/{way}/{session_id}") as response:
                return int(response.status)

        sessions = [(way, f"{way}-{each}") for way in WAYS for each in SESSIONS]
        statuses = await soon(asyncio.gather(*(turn(*each) for each in sessions)))
        connector = app[CLIENT].connector
        assert connector is not None
        await until(lambda: not connector._acquired)
        counted = app[PINS].summary()
        if enabled:
            assert (counted.failed, counted.unknown) == (len(sessions), len(sessions))
        assert set(app[PINS].sessions()) == ({each for _, each in sessions} if enabled else set())
    release.set()
    await until(lambda: asyncio.all_tasks() <= before)
    return statuses


async def test_calls_that_a_handler_gives_up_leave_the_next_one_its_key() -> None:
    outcomes = []
    for enabled in (True, False):
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(recording_gateway())
            release = stack.enter_context(holding(gateway))
            outcomes.append(await give_up(gateway, release, enabled=enabled))
            assert_keys(gateway.calls, plugin=enabled)
    assert outcomes[0] == outcomes[1] == [200] * len(SESSIONS) * len(WAYS)

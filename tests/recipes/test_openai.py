"""OpenAI's SDK on its default client, which is httpx, and on its aiohttp client."""

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import ROUTING, setup
from aiohttp_smg_routing.testing import Recorder, StartSmgGateway, answer
from harness.agents import chat

from ..turns import answered
from .serving import SESSIONS, TURNS, asks, assert_all_pinned, clients_of, play_asks

if TYPE_CHECKING:  # importing it takes seconds, and each process collects this file
    from openai import AsyncOpenAI


CLIENTS = clients_of("openai")


@pytest.fixture(params=[*CLIENTS])
async def sdk(
    request: pytest.FixtureRequest, recording_gateway: Recorder
) -> "AsyncIterator[AsyncOpenAI]":
    async with new_sdk(recording_gateway.url, CLIENTS[request.param]()) as openai:
        yield openai


def new_sdk(gateway: URL, http_client: Any = None) -> "AsyncOpenAI":
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{gateway}/v1", api_key="none", http_client=http_client)


def asking(sdk: "AsyncOpenAI") -> Callable[[web.Request], Any]:
    async def ask(request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("stream"):
            chunks = await sdk.chat.completions.create(**body)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        else:
            completion = await sdk.chat.completions.create(**body)
            text = completion.choices[0].message.content
        assert text == "ok"
        await sdk.models.list()  # not a turn
        return web.Response(text=text)

    return ask


@pytest.mark.parametrize("stream", [False, True])
async def test_each_turn_carries_the_key_of_its_session(
    recording_gateway: Recorder, sdk: "AsyncOpenAI", aiohttp_client: AiohttpClient, stream: bool
) -> None:
    app = asks(asking(sdk), recording_gateway.url)
    client = await aiohttp_client(app)
    await play_asks(client.make_url("/"), stream=stream)
    assert_all_pinned(recording_gateway)
    others = [call for call in recording_gateway.calls if call.path == "/v1/models"]
    assert others
    assert not any(call.keys for call in others)
    assert app[ROUTING].pins.summary().unknown == len(SESSIONS) * TURNS  # each counted once


async def test_the_sdks_own_retries_carry_it_too(
    recording_gateway: Recorder, sdk: "AsyncOpenAI", aiohttp_client: AiohttpClient
) -> None:
    app = asks(asking(sdk), recording_gateway.url)
    client = await aiohttp_client(app)
    busy = answer(status=503, headers={"Retry-After-Ms": "1"})
    recording_gateway.answer_with(busy, busy)
    await answered(client, "/sessions/s-1/ask", json=chat("s-1"))
    recording_gateway.assert_pinned("s-1", turns=3)
    assert app[ROUTING].pins.summary().failed == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_the_hook_on_one_client_only(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient, stream: bool
) -> None:
    from openai import DefaultAsyncHttpxClient

    app = web.Application()
    routing = setup(app, {"gateway": str(recording_gateway.url)})
    http_client = DefaultAsyncHttpxClient(event_hooks=routing.httpx_hooks())
    async with (
        new_sdk(recording_gateway.url, http_client) as sdk,
        new_sdk(recording_gateway.url) as other,
    ):
        app.router.add_post("/sessions/{session_id}/ask", asking(sdk))
        app.router.add_post("/sessions/{session_id}/other", asking(other))
        client = await aiohttp_client(app)
        await play_asks(client.make_url("/"), stream=stream)
        assert_all_pinned(recording_gateway)
        recording_gateway.calls.clear()
        await client.post("/sessions/s-1/other", json=chat("s-1"))
    assert not any(call.keys for call in recording_gateway.calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_default_client_stays_on_one_worker_of_the_real_gateway(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient, stream: bool
) -> None:
    smg = await smg_gateway(3, policy="manual")
    async with new_sdk(smg.url) as sdk:
        app = asks(asking(sdk), smg.url)
        client = await aiohttp_client(app)
        await play_asks(client.make_url("/"), stream=stream)
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS)
    count = len(SESSIONS)
    assert +await smg.branches() == {"vacant": count, "occupied_hit": count * (TURNS - 1)}
    summary = app[ROUTING].pins.summary()
    assert (summary.first, summary.kept) == (count, count * (TURNS - 1))

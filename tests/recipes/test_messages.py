"""Anthropic's SDK as a client of a proxy, and each of its clients within a server."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING, RoutingConfig, setup
from aiohttp_smg_routing.testing import Answer, Call, Recorder, StartSmgGateway, answer, canned

from .serving import SESSIONS, TURNS, assert_gateway_pinned, clients_of, play_asks
from .unedited import make_app

if TYPE_CHECKING:  # importing it takes seconds, and each process collects this file
    from anthropic import AsyncAnthropic

CLIENTS = clients_of("anthropic")
EVENTS = b"""\
event: message_start
data: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",\
"model":"stub","content":[],"usage":{"input_tokens":1,"output_tokens":1}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"ok"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_stop
data: {"type":"message_stop"}

"""


def new_sdk(url: str, http_client: Any = None) -> "AsyncAnthropic":
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(base_url=url, api_key="none", http_client=http_client)


def streamed(call: Call) -> Answer:
    if call.path == "/v1/messages" and call.json().get("stream"):
        return answer(EVENTS, headers={"Content-Type": "text/event-stream"})
    return canned(call)


async def message(sdk: "AsyncAnthropic", session_id: str, *, stream: bool) -> None:
    turn: Any = {
        "model": "stub",
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "hello"}],
        "metadata": {"user_id": session_id},
    }
    if stream:
        async with sdk.messages.stream(**turn) as events:
            answered = await events.get_final_message()
    else:
        answered = await sdk.messages.create(**turn)
    assert answered.content[0].text == "ok"


@pytest.mark.parametrize("stream", [False, True])
async def test_each_session_stays_on_one_worker(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient, stream: bool
) -> None:
    smg = await smg_gateway(3, policy="manual")
    for worker in smg.workers:
        worker.answer = streamed
    app = make_app(smg.url)
    setup(
        app,
        RoutingConfig(
            smg.url,
            instrument=True,
            session_id="json:metadata.user_id",
            paths=["/v1/messages"],
        ),
    )
    url = str((await aiohttp_client(app)).make_url("/"))

    async def agent(session_id: str) -> None:
        async with new_sdk(url, CLIENTS["aiohttp"]()) as sdk:
            for _ in range(TURNS):
                await message(sdk, session_id, stream=stream)

    await asyncio.gather(*map(agent, SESSIONS))
    await assert_gateway_pinned(smg)


# In a server


def add_ask(app: web.Application, sdk: "AsyncAnthropic") -> None:
    async def ask(request: web.Request) -> web.Response:
        body = await request.json()
        await message(sdk, body["user"], stream=body["stream"])
        return web.Response()

    app.router.add_post("/sessions/{session_id}/ask", ask)


def assert_keys_of_messages(gateway: Recorder) -> None:
    calls = [call for call in gateway.calls if call.path == "/v1/messages"]
    assert len(calls) == len(SESSIONS) * TURNS
    for call in calls:
        assert call.keys == [call.json()["metadata"]["user_id"].encode()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("http_client", CLIENTS.values(), ids=CLIENTS)
async def test_a_server_that_calls_by_the_sdk(
    recording_gateway: Recorder,
    aiohttp_client: AiohttpClient,
    http_client: Callable[[], Any],
    stream: bool,
) -> None:
    recording_gateway.answer = streamed
    app, url = web.Application(), str(recording_gateway.url)
    async with new_sdk(url, http_client()) as sdk:
        add_ask(app, sdk)
        setup(app, {"gateway": url, "instrument": True, "paths": "/v1/messages"})
        await play_asks((await aiohttp_client(app)).make_url("/"), stream=stream)
    assert_keys_of_messages(recording_gateway)
    assert app[ROUTING].pins.summary().unknown == len(SESSIONS) * TURNS  # each counted once


async def test_the_hook_on_one_client_only(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    from anthropic import DefaultAsyncHttpxClient

    app, url = web.Application(), str(recording_gateway.url)
    routing = setup(app, {"gateway": url, "paths": "/v1/messages"})
    http_client = DefaultAsyncHttpxClient(event_hooks=routing.httpx_hooks())
    async with new_sdk(url, http_client) as sdk:
        add_ask(app, sdk)
        await play_asks((await aiohttp_client(app)).make_url("/"), stream=False)
    assert_keys_of_messages(recording_gateway)

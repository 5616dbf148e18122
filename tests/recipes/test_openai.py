"""OpenAI's SDK on its aiohttp client, which keeps its ClientSession to itself."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from openai import AsyncOpenAI, DefaultAioHttpClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING
from aiohttp_smg_routing.testing import Recorder, answer
from harness.agents import chat

from .serving import asks, assert_no_crosstalk, play_asks


@pytest.fixture
async def sdk(recording_gateway: Recorder) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"{recording_gateway.url}/v1"
    client = DefaultAioHttpClient()
    async with AsyncOpenAI(base_url=base_url, api_key="none", http_client=client) as openai:
        yield openai


def server(gateway: Recorder, sdk: AsyncOpenAI) -> web.Application:
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

    return asks(ask, gateway.url)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_turn_carries_the_key_of_its_session(
    recording_gateway: Recorder, sdk: AsyncOpenAI, aiohttp_client: AiohttpClient, stream: bool
) -> None:
    client = await aiohttp_client(server(recording_gateway, sdk))
    await play_asks(client.make_url("/"), stream=stream)
    assert_no_crosstalk(recording_gateway)
    others = [call for call in recording_gateway.calls if call.path == "/v1/models"]
    assert others
    assert not any(call.keys for call in others)


async def test_the_sdks_own_retries_carry_it_too(
    recording_gateway: Recorder, sdk: AsyncOpenAI, aiohttp_client: AiohttpClient
) -> None:
    app = server(recording_gateway, sdk)
    client = await aiohttp_client(app)
    busy = answer(status=503, headers={"Retry-After-Ms": "1"})
    recording_gateway.answer_with(busy, busy)
    async with client.post("/sessions/s-1/ask", json=chat("s-1")) as response:
        assert response.status == 200
    recording_gateway.assert_pinned("s-1", turns=3)
    assert app[ROUTING].pins.summary().failed == 2

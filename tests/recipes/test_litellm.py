"""litellm over aiohttp, its default, and over httpx; its clients outlive an app."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing.testing import Recorder, recording_gateway

from .serving import asks, assert_all_pinned, play_asks


@pytest.fixture(autouse=True, params=["aiohttp", "httpx"])
async def _over(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    import litellm  # importing it takes seconds, and each process collects this file

    monkeypatch.setattr(litellm, "disable_aiohttp_transport", request.param == "httpx")
    yield request.param
    await litellm.close_litellm_async_clients()
    litellm.in_memory_llm_clients_cache.flush_cache()


def server(gateway: Recorder) -> web.Application:
    async def ask(request: web.Request) -> web.Response:
        import litellm

        body = await request.json()
        body["model"] = "openai/stub"
        body["allowed_openai_params"] = ["user"]  # otherwise litellm drops ``user``
        answer = await litellm.acompletion(
            api_base=f"{gateway.url}/v1", api_key="none", num_retries=0, **body
        )
        if body.get("stream"):
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
        else:
            text = answer.choices[0].message.content
        assert text == "ok"
        return web.Response(text=text)

    return asks(ask, gateway.url)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_turn_carries_the_key_of_its_session(
    aiohttp_client: AiohttpClient, stream: bool
) -> None:
    for _ in range(2):  # the second app gets the ClientSession that litellm made for the first
        async with recording_gateway() as gateway:
            client = await aiohttp_client(server(gateway))
            await play_asks(client.make_url("/"), stream=stream)
            assert_all_pinned(gateway)
            await client.close()

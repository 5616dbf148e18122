"""aiohttp-client-cache, a subclass of ClientSession: the calls that go out carry the key."""

from typing import Any

import pytest
from aiohttp import web
from aiohttp_client_cache.backends.base import CacheBackend
from aiohttp_client_cache.session import CachedSession
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import PinSummary, setup
from aiohttp_smg_routing.testing import Recorder
from harness.agents import chat

from .serving import SESSIONS, assert_all_pinned, play


@pytest.mark.parametrize("instrument", [True, False])
async def test_what_goes_out_carries_the_key_and_what_is_cached_is_no_call(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient, instrument: bool
) -> None:
    app = web.Application()
    routing = setup(app, {"gateway": str(recording_gateway.url), "instrument": instrument})
    arguments: dict[str, Any] = {} if instrument else {"trace_configs": [routing.trace_config()]}
    cache = CacheBackend(allowed_methods=("POST",))

    async def handler(request: web.Request) -> web.Response:
        async with (
            CachedSession(cache=cache, **arguments) as session,
            session.post(recording_gateway.chat, json=await request.json()) as answer,
        ):
            return web.Response(body=await answer.read())

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    await play(
        client.make_url("/"), lambda session_id: {"path": session_id, "json": chat(session_id)}
    )
    assert_all_pinned(recording_gateway, turns=1)
    assert routing.pins.summary() == PinSummary(unknown=len(SESSIONS), sessions=len(SESSIONS))

"""aiohttp-retry: each attempt keeps the key."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp_retry import ExponentialRetry, RetryClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, setup
from aiohttp_smg_routing.testing import Recorder, failure
from harness.agents import chat

from ..turns import answered
from .serving import SESSIONS

RETRYING = web.AppKey("retrying", RetryClient)
OPTIONS = ExponentialRetry(attempts=3, start_timeout=0.001)


@pytest.mark.parametrize("instrument", [True, False])
async def test_each_attempt_keeps_the_key(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient, instrument: bool
) -> None:
    app = web.Application()
    routing = setup(app, RoutingConfig(recording_gateway.url, instrument=instrument))
    hooks = [] if instrument else [routing.trace_config()]

    async def retry_client(app: web.Application) -> AsyncIterator[None]:
        async with RetryClient(retry_options=OPTIONS, trace_configs=hooks) as app[RETRYING]:
            yield

    async def handler(request: web.Request) -> web.Response:
        retrying = request.app[RETRYING]
        async with retrying.post(recording_gateway.chat, json=await request.json()) as answer:
            return web.Response(body=await answer.read(), status=answer.status)

    app.cleanup_ctx.append(retry_client)
    app.router.add_post("/sessions/{session_id}", handler)
    client = await aiohttp_client(app)
    for session_id in SESSIONS:
        recording_gateway.answer_with(failure(503), failure(500))
        await answered(client, f"/sessions/{session_id}", json=chat(session_id))
        recording_gateway.assert_pinned(session_id, turns=3)
    assert routing.pins.summary().failed == 2 * len(SESSIONS)

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.gateway import CHAT_COMPLETIONS
from aiohttp_smg_routing.testing import Recorder, recording_gateway

CLIENT = web.AppKey("client", ClientSession)

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding"}


@pytest.fixture(name="gateway")
def _gateway(recording_gateway: Recorder) -> Recorder:
    return recording_gateway


@pytest.fixture
async def elsewhere() -> AsyncIterator[Recorder]:
    async with recording_gateway() as recorder:
        yield recorder


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    """A client of the server under test, and of nothing else: it has no hook."""
    async with ClientSession() as session:
        yield session


def naive_proxy(upstream: URL) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the handler that is out there: it copies whatever the client sent."""

    async def handler(request: web.Request) -> web.Response:
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP
        ]
        async with request.config_dict[CLIENT].post(
            upstream.with_path(CHAT_COMPLETIONS), data=await request.read(), headers=headers
        ) as response:
            return web.Response(body=await response.read(), status=response.status)

    return handler


def session_server(upstream: URL, **config: object) -> web.Application:
    """Return a session server in front of ``upstream``, with the plugin added by its one line."""
    app = web.Application()

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield

    app.cleanup_ctx.append(client_session)
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(upstream))
    app.router.add_post("/v1/chat/completions", naive_proxy(upstream))
    setup(app, {"gateway": str(upstream), "client_session": "client", **config})
    return app

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import ClientSession, web

from aiohttp_smg_routing import setup

from .wire import Wire, recording_server

CLIENT = web.AppKey("client", ClientSession)

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding"}


@pytest.fixture
async def gateway() -> AsyncIterator[Wire]:
    async with recording_server() as wire:
        yield wire


@pytest.fixture
async def elsewhere() -> AsyncIterator[Wire]:
    async with recording_server() as wire:
        yield wire


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    """A client of the server under test, and of nothing else: it has no hook."""
    async with ClientSession() as session:
        yield session


def naive_proxy(upstream: Wire) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the handler that is out there: it copies whatever the client sent."""

    async def handler(request: web.Request) -> web.Response:
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP
        ]
        async with request.config_dict[CLIENT].post(
            upstream.chat, data=await request.read(), headers=headers
        ) as response:
            return web.Response(body=await response.read(), status=response.status)

    return handler


def session_server(upstream: Wire, **config: object) -> web.Application:
    """Return a session server in front of ``upstream``, with the plugin added by its one line."""
    app = web.Application()

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield

    app.cleanup_ctx.append(client_session)
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(upstream))
    app.router.add_post("/v1/chat/completions", naive_proxy(upstream))
    setup(app, {"gateway": str(upstream.url), "client_session": "client", **config})
    return app

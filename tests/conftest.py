from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.gateway import CHAT_COMPLETIONS
from aiohttp_smg_routing.testing import Recorder, recording_gateway

CLIENT = web.AppKey("client", ClientSession)

Headers = list[tuple[str, str]]
Forward = Callable[[web.Request], Any]

# The body is sent anew; all else is copied.
_FRAMING = {"host", "content-length", "transfer-encoding"}


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


def copied(request: web.Request) -> Headers:
    """Return whatever headers the client sent, as a naive proxy sends them on."""
    return [pair for pair in request.headers.items() if pair[0].lower() not in _FRAMING]


def naive_proxy(
    upstream: URL, forward: Forward = copied
) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the handler that is out there: it sends on the headers that ``forward`` returns."""

    async def handler(request: web.Request) -> web.Response:
        async with request.config_dict[CLIENT].post(
            upstream.with_path(CHAT_COMPLETIONS),
            data=await request.read(),
            headers=forward(request),
        ) as response:
            return web.Response(body=await response.read(), status=response.status)

    return handler


def proxy_server(upstream: URL, forward: Forward = copied) -> web.Application:
    """Return a session server in front of ``upstream`` that knows nothing of the plugin."""
    app = web.Application()

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield

    app.cleanup_ctx.append(client_session)
    for path in ("/sessions/{session_id}/v1/chat/completions", "/v1/chat/completions"):
        app.router.add_post(path, naive_proxy(upstream, forward))
    return app


def session_server(upstream: URL, **config: object) -> web.Application:
    """Return a session server in front of ``upstream``, with the plugin added by its one line."""
    app = proxy_server(upstream)
    setup(app, {"gateway": str(upstream), "client_session": "client", **config})
    return app

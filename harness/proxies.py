"""Typical proxies: session servers that copy a call, with and without the plugin."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import setup

from .agents import CHAT, CHAT_PATH

CLIENT = web.AppKey("client", ClientSession)

Headers = list[tuple[str, str]]
Forward = Callable[[web.Request], Any]

# The body is sent anew; all else is copied.
_FRAMING = {"host", "content-length", "transfer-encoding"}


def copied(request: web.Request) -> Headers:
    """Return whatever headers the client sent, as a naive proxy sends them on."""
    return [pair for pair in request.headers.items() if pair[0].lower() not in _FRAMING]


async def client_session(app: web.Application) -> AsyncIterator[None]:
    """Keep a ``ClientSession`` under ``CLIENT`` for as long as the app runs."""
    async with ClientSession() as app[CLIENT]:
        yield


def naive_proxy(
    upstream: URL, forward: Forward = copied, back: frozenset[str] = frozenset()
) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the handler of a proxy that passes on the headers that ``forward`` returns.

    ``back`` names the headers of the answer that it passes on.
    """

    async def handler(request: web.Request) -> web.Response:
        async with request.config_dict[CLIENT].post(
            upstream.with_path(CHAT_PATH),
            data=await request.read(),
            headers=forward(request),
        ) as response:
            headers = {name: response.headers[name] for name in back & response.headers.keys()}
            return web.Response(body=await response.read(), status=response.status, headers=headers)

    return handler


def proxy_server(
    upstream: URL, forward: Forward = copied, back: frozenset[str] = frozenset()
) -> web.Application:
    """Return a session server in front of ``upstream`` that knows nothing of the plugin."""
    app = web.Application()
    app.cleanup_ctx.append(client_session)
    for path in (f"/sessions/{{session_id}}/{CHAT}", CHAT_PATH):
        app.router.add_post(path, naive_proxy(upstream, forward, back))
    return app


def pinned_server(upstream: URL, **config: object) -> web.Application:
    """Return a session server in front of ``upstream``, with the plugin added by its one line."""
    app = proxy_server(upstream)
    setup(app, {"gateway": str(upstream), "client_session": "client", **config})
    return app

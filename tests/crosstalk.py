"""Calls whose body is the id of the session that they belong to."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing.testing import Recorder
from harness.proxies import CLIENT, pinned_server

from .turns import answered

if TYPE_CHECKING:
    from .turns import Client

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def server_with(handler: Handler, gateway: Recorder, **config: object) -> web.Application:
    """Return a session server whose turns the handler plays, with the plugin."""
    app = pinned_server(gateway.url, **config)
    app.router.add_post("/{session_id}", handler)
    return app


async def post(session: ClientSession, wire: Recorder, session_id: str = "") -> None:
    """Call the gateway; the body names the session that the call belongs to."""
    async with session.post(wire.chat, data=session_id.encode()) as response:
        await response.read()


async def call(request: web.Request, wire: Recorder) -> None:
    """Call the gateway from a handler, in the session of its request."""
    await post(request.config_dict[CLIENT], wire, request.match_info["session_id"])


async def in_handler(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """Handle a turn with one call."""
    await call(request, wire)
    return web.Response()


def anew(url: URL | str, **options: Any) -> Handler:
    """Return a handler that makes a ClientSession for its call."""

    async def handler(request: web.Request) -> web.StreamResponse:
        async with ClientSession(**options) as session, session.post(url):
            return web.Response()

    return handler


async def two_chunks(request: web.Request, wire: Recorder) -> AsyncIterator[bytes]:
    """Yield two chunks of a body, with a call for each."""
    for _ in range(2):
        await call(request, wire)
        yield b"chunk"


async def in_streamed_body(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """Handle a turn with a body that makes two calls when the handler has returned."""
    return web.Response(body=two_chunks(request, wire))


async def in_streamed_response(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """Handle a turn with two calls after the answer has begun."""
    response = web.StreamResponse()
    await response.prepare(request)
    async for chunk in two_chunks(request, wire):
        await response.write(chunk)
    return response


async def three_turns(client: "Client", session_id: str) -> None:
    """Play three turns of a session, one after the other, on connections that are kept alive."""
    for _ in range(3):
        await answered(client, f"/{session_id}")


def assert_no_crosstalk(wire: Recorder, calls: int) -> None:
    assert len(wire.calls) == calls
    assert [call.keys for call in wire.calls] == [[call.body] for call in wire.calls]

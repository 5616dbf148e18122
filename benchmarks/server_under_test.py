"""The session server under test, in its own process.

It is either the whole server of ``examples/`` or the barest proxy possible. One process runs all
arms, each on its own port, so that all have the same conditions.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler
from yarl import URL

from aiohttp_smg_routing import ROUTING_KEY_HEADER, setup
from aiohttp_smg_routing.testing import child_process, free_ports
from examples.session_server import CLIENT, make_app
from harness.agents import CHAT
from harness.processes import command, local_url
from harness.servers import serve

Loop = Literal["asyncio", "uvloop"]
Kind = Literal["whole", "barest"]
ArmName = Literal[
    "nothing",  # no key
    "by hand",  # the barest proxy sets headers=; for the whole server the agent sends the key
    "floor",  # by hand, with a middleware and a TraceConfig that do nothing
    "plugin",
]

KEY = str(ROUTING_KEY_HEADER)
SSE = "text/event-stream"

_CLIENT = web.AppKey("client_session", aiohttp.ClientSession)


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """A session server in another process, with the URL of each arm."""

    urls: dict[ArmName, URL]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used so far."""
        self.writer.write(b"\n")
        return float(await self.reader.readline())


@asynccontextmanager
async def server_under_test(
    gateway: URL, arms: Sequence[ArmName], *, kind: Kind = "barest", loop: Loop = "asyncio"
) -> AsyncIterator[ServerUnderTest]:
    """Run a session server with all ``arms``; enter the block once they listen.

    An arm answers ``POST /sessions/{session_id}/v1/chat/completions``; the whole server requires
    ``POST /sessions`` before that.
    """
    control, *free = free_ports(1 + len(arms))
    ports = dict(zip(arms, free, strict=True))
    connected: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ready() -> bool:
        try:
            connected.append(await asyncio.open_connection("127.0.0.1", control))
        except OSError:
            return False
        return True

    told = {"gateway": str(gateway), "ports": ports, "control": control, "kind": kind}
    async with child_process(*command(main, loop=loop, **told), ready=ready):
        reader, writer = connected[-1]
        urls = {arm: local_url(port) for arm, port in ports.items()}
        try:
            yield ServerUnderTest(urls, reader, writer)
        finally:
            writer.close()


def whole_app(gateway: URL, arm: ArmName) -> web.Application:
    """Return the session server of ``examples/``; it passes on the key that an agent sends."""
    plugin = {
        "enabled": arm == "plugin",
        "gateway": str(gateway),
        "client_session": "client_session",
    }
    app = make_app({"gateway": {"url": str(gateway)}, "smg_routing": plugin})
    if arm == "floor":

        async def trace(app: web.Application) -> AsyncIterator[None]:
            config = aiohttp.TraceConfig()
            config.freeze()
            app[CLIENT].trace_configs.append(config)
            yield

        app.middlewares.append(_pass_through)
        app.cleanup_ctx.append(trace)
    return app


def barest_app(gateway: URL, arm: ArmName) -> web.Application:
    """Return a proxy that passes on bodies without parsing or keeping them."""
    chat = gateway / CHAT
    by_hand = arm in ("by hand", "floor")
    app = web.Application()
    options: dict[str, Any] = {}
    if arm == "floor":
        app.middlewares.append(_pass_through)
        options = {"trace_configs": [aiohttp.TraceConfig()]}

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        connector, jar = aiohttp.TCPConnector(limit=0), aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=connector, cookie_jar=jar, **options) as app[
            _CLIENT
        ]:
            yield

    async def turn(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/json"}
        if by_hand:
            headers[KEY] = request.match_info["session_id"]
        async with request.app[_CLIENT].post(
            chat, data=await request.read(), headers=headers
        ) as answer:
            if answer.content_type == SSE:
                return await _relay(request, answer)
            body = await answer.read()
            return web.Response(body=body, status=answer.status, content_type=answer.content_type)

    app.cleanup_ctx.append(client_session)
    app.router.add_post(f"/sessions/{{session_id}}/{CHAT}", turn)
    if arm == "plugin":
        setup(app, {"gateway": str(gateway), "client_session": "client_session"})
    return app


async def _relay(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Pass a stream on as it arrives."""
    response = web.StreamResponse(headers={"Content-Type": SSE})
    await response.prepare(request)
    async for chunk in answer.content.iter_any():
        await response.write(chunk)
    return response


@web.middleware
async def _pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


class _Control(asyncio.Protocol):
    """Answers any data with the CPU time of this process, and uses almost none for it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self._transport.write(f"{time.process_time():.9f}\n".encode())


async def _run(gateway: str, ports: dict[ArmName, int], control: int, kind: Kind) -> None:
    app = whole_app if kind == "whole" else barest_app
    async with AsyncExitStack() as stack:
        for arm, port in ports.items():
            running = serve(app(URL(gateway), arm), port, handler_cancellation=True)
            await stack.enter_async_context(running)
        gc.collect()
        gc.freeze()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Control, "127.0.0.1", control)
        await server.serve_forever()  # until it is killed


def main(loop: Loop, gateway: str, ports: dict[ArmName, int], control: int, kind: Kind) -> None:
    """Run the session server in this process until it is killed."""
    if loop == "uvloop":
        import uvloop

        new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    else:
        new_loop = asyncio.new_event_loop
    new_loop().run_until_complete(_run(gateway, ports, control, kind))

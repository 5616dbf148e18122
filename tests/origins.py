"""Send calls to any origin to two recorders: one for the gateway's origin, one for all others."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import trustme
from aiohttp import ClientError, ClientRequest, ClientResponse, ClientSession, TCPConnector
from aiohttp.connector import Connection

from aiohttp_smg_routing import ROUTING_KEY_HEADER, Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import Answer, Call, Recorder, answer, recording_gateway

#: Errors of a call that is refused before it leaves; aiohttp 3.9 also raises AssertionError.
_REFUSED = (ClientError, ValueError, IndexError, OSError, AssertionError)

Send = Callable[[ClientSession], Awaitable[ClientResponse]]

TARGET_WORKER_HEADER = "X-SMG-Target-Worker"
_ROUTING = {str(name).lower() for name in (ROUTING_KEY_HEADER, TARGET_WORKER_HEADER)}


@dataclass(frozen=True)
class GatewayUrl:
    """A gateway's URL as in a config, and where its chat completions must arrive."""

    said: str
    host: str
    port: int
    path: str = "/v1/chat/completions"
    scheme: str = "http"


@dataclass(frozen=True)
class Arrived:
    """A call that arrived, and whether it came to the gateway's origin."""

    at_gateway: bool
    call: Call

    def is_chat(self, gateway: GatewayUrl) -> bool:
        """Tell from the request alone whether the call is a chat completion for the gateway."""
        line = self.call.start_line.partition(b"?")[0].removesuffix(b" HTTP/1.1")
        return self.at_gateway and line == f"POST {gateway.path}".encode()

    def but_routing(self) -> list[bytes]:
        """Return the header lines, except ``Connection`` and those that choose a worker."""
        names = {*_ROUTING, "connection"}
        return [
            line
            for line in self.call.header_lines
            if line.partition(b":")[0].decode().lower() not in names
        ]

    def connection(self) -> list[bytes]:
        """Return the values of ``Connection``."""
        return self.call.values("Connection")

    def names_the_key(self) -> bool:
        """Tell whether ``Connection`` names the key's header, which makes a proxy drop it."""
        named = b",".join(self.connection()).lower().split(b",")
        return ROUTING_KEY_HEADER.lower().encode() in map(bytes.strip, named)


@dataclass
class Origins:
    """The two recorders that receive the calls to all origins."""

    gateway: Recorder
    elsewhere: Recorder
    tls_ports: dict[int, int]
    """The port that each recorder's port has under TLS."""
    under_tls: set[asyncio.Task[None]]
    arrived: list[Arrived] = field(default_factory=list)

    async def send(
        self, gateway: GatewayUrl, send: Send, answers: tuple[Answer, ...] = (), **session: Any
    ) -> tuple[type[Exception] | None, list[Arrived]]:
        """Send a call; return the type of its error, if any, and the calls that arrived."""
        self.arrived.clear()
        rest = iter(answers)
        for wire in (self.gateway, self.elsewhere):
            wire.answer = self._answer(wire, rest)
        try:
            async with ClientSession(connector=_Loopback(gateway, self), **session) as client:
                response = await asyncio.wait_for(send(client), 60)
                response.release()
        except _REFUSED as error:
            return type(error), list(self.arrived)
        finally:
            await asyncio.gather(*self.under_tls)  # each ends after its client
        return None, list(self.arrived)

    def _answer(self, wire: Recorder, answers: Any) -> Callable[[Call], Answer]:
        def to(call: Call) -> Answer:
            self.arrived.append(Arrived(wire is self.gateway, call))
            given: Answer = next(answers, answer())
            return given

        return to

    async def assert_key_or_nothing(
        self,
        gateway: GatewayUrl,
        send: Send,
        *,
        answers: tuple[Answer, ...] = (),
        **session: Any,
    ) -> list[Arrived]:
        """Assert that a chat completion to the gateway gains the key, and other calls don't change.

        It sends the call without the plugin first, to compare. It returns the calls that arrived
        with the plugin.
        """
        plain_error, plain = await self.send(gateway, send, answers, **session)
        hook = Routing(_config(gateway.said)).trace_config()
        with routing_session("s-1"):
            error, tagged = await self.send(gateway, send, answers, trace_configs=[hook], **session)
        assert error is plain_error
        assert len(tagged) == len(plain)
        for before, after in zip(plain, tagged, strict=True):
            if after.is_chat(gateway):
                assert before.is_chat(gateway)
                assert after.call.keys == [b"s-1"]
                assert after.call.values(TARGET_WORKER_HEADER) == []
                assert after.but_routing() == before.but_routing()
                assert after.connection() == before.connection() or before.names_the_key()
                assert not after.names_the_key()
                assert after.call.body == before.call.body
            else:
                assert after == before
        return tagged


@cache
def _config(gateway: str) -> RoutingConfig:
    return RoutingConfig(gateway)


class _Loopback(TCPConnector):
    """A connector that leads each host name or address to a recorder, without DNS."""

    def __init__(self, gateway: GatewayUrl, origins: Origins) -> None:
        super().__init__(ssl=False)
        self._of_gateway = (gateway.scheme, gateway.host, gateway.port)
        self._origins = origins
        self._is_gateway, self._is_tls = False, False

    async def connect(self, req: ClientRequest, *rest: Any, **named: Any) -> Connection:
        # Calls come one after another, because aiohttp reads a redirect before it follows it.
        url = req.url
        origin = (url.scheme, (url.raw_host or "").lower(), url.port)
        self._is_gateway, self._is_tls = origin == self._of_gateway, req.is_ssl()
        return await super().connect(req, *rest, **named)

    async def _resolve_host(self, host: str, *_: Any, **__: Any) -> list[Any]:
        host.encode("idna")  # refuse invalid names as a resolver does
        origins = self._origins
        led_to = (origins.gateway if self._is_gateway else origins.elsewhere).url.port
        assert led_to
        if self._is_tls:
            led_to = origins.tls_ports[led_to]
        there = {"hostname": host, "host": "127.0.0.1", "port": led_to}
        return [{**there, "family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST}]


@asynccontextmanager
async def all_origins() -> AsyncIterator[Origins]:
    """Run both recorders until the block ends, each with and without TLS."""
    under_tls: set[asyncio.Task[None]] = set()
    async with (
        recording_gateway() as gateway,
        recording_gateway() as elsewhere,
        _tls(gateway, under_tls) as gateway_tls,
        _tls(elsewhere, under_tls) as elsewhere_tls,
    ):
        yield Origins(gateway, elsewhere, dict([gateway_tls, elsewhere_tls]), under_tls)


@asynccontextmanager
async def _tls(
    recorder: Recorder, tasks: set[asyncio.Task[None]]
) -> AsyncIterator[tuple[int, int]]:
    """Listen with TLS and pass on to the recorder; yield the recorder's port and the TLS port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("any.example").configure_cert(context)  # no client verifies it
    port = recorder.url.port
    assert port

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(2**16):
                writer.write(piece)
                await writer.drain()
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context) as server:
        yield port, server.sockets[0].getsockname()[1]

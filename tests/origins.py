"""Every origin leads to this machine: the gateway's to one recorder, any other to a second one."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession, TCPConnector

from aiohttp_smg_routing import RoutingConfig, routing_session, routing_trace_config
from aiohttp_smg_routing.gateway import ROUTING_KEY_HEADER, TARGET_WORKER_HEADER
from aiohttp_smg_routing.testing import Answer, Call, Recorder, answer, recording_gateway

#: How a call is refused before it leaves; aiohttp 3.9 asserts that a URL has a scheme of its own.
_REFUSED = (ClientError, ValueError, IndexError, OSError, AssertionError)

Send = Callable[[ClientSession], Awaitable[ClientResponse]]

_ROUTING = {str(name).lower() for name in (ROUTING_KEY_HEADER, TARGET_WORKER_HEADER)}


@dataclass(frozen=True)
class Gateway:
    """A gateway as a config says it, and where its chat completions are to arrive."""

    said: str
    host: str
    port: int
    path: str = "/v1/chat/completions"


@dataclass(frozen=True)
class Arrived:
    """A call that arrived, and whether it came to the gateway's host and port."""

    at_gateway: bool
    call: Call

    def is_chat(self, gateway: Gateway) -> bool:
        """Tell whether it is what the key is for, by what arrived alone."""
        line = self.call.start_line.partition(b"?")[0].removesuffix(b" HTTP/1.1")
        return self.at_gateway and line == f"POST {gateway.path}".encode()

    def but_routing(self) -> list[bytes]:
        """Return its header lines without those that choose a worker."""
        lines = self.call.header_lines
        return [it for it in lines if it.partition(b":")[0].decode().lower() not in _ROUTING]


@dataclass
class Origins:
    """Two recorders that all origins lead to."""

    gateway: Recorder
    elsewhere: Recorder
    arrived: list[Arrived] = field(default_factory=list)

    async def send(
        self, gateway: Gateway, send: Send, answers: tuple[Answer, ...] = (), **session: Any
    ) -> tuple[type[Exception] | None, list[Arrived]]:
        """Send a call; return what it raised, if it did, and what arrived."""
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
        return None, list(self.arrived)

    def _answer(self, wire: Recorder, answers: Any) -> Callable[[Call], Answer]:
        def to(call: Call) -> Answer:
            self.arrived.append(Arrived(wire is self.gateway, call))
            given: Answer = next(answers, answer())
            return given

        return to

    async def assert_key_or_nothing(
        self,
        gateway: Gateway,
        send: Send,
        *,
        answers: tuple[Answer, ...] = (),
        scheme: str = "http",
        **session: Any,
    ) -> None:
        """Assert that a chat completion to the gateway gains the key, and no other call anything.

        The call is sent without the plugin first, which shows what it is without it.
        """
        plain_error, plain = await self.send(gateway, send, answers, **session)
        hook = routing_trace_config(RoutingConfig(gateway.said))
        with routing_session("s-1"):
            error, hooked = await self.send(gateway, send, answers, trace_configs=[hook], **session)
        assert error is plain_error
        assert len(hooked) == len(plain)
        for before, after in zip(plain, hooked, strict=True):
            if scheme == "http" and after.is_chat(gateway):
                assert before.is_chat(gateway)
                assert after.call.keys == [b"s-1"]
                assert after.call.values(TARGET_WORKER_HEADER) == []
                assert after.but_routing() == before.but_routing()
                assert after.call.body == before.call.body
            else:
                assert after == before


class _Loopback(TCPConnector):
    """Asks no DNS, and takes no address for what it says."""

    def __init__(self, gateway: Gateway, origins: Origins) -> None:
        super().__init__()
        self._of_gateway = (gateway.host, gateway.port)
        self._origins = origins

    async def _resolve_host(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        is_gateway = (host.lower(), port) == self._of_gateway
        wire = self._origins.gateway if is_gateway else self._origins.elsewhere
        there = {"hostname": host, "host": "127.0.0.1", "port": wire.url.port}
        return [{**there, "family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST}]


@asynccontextmanager
async def all_origins() -> AsyncIterator[Origins]:
    """Run both recorders until the block ends."""
    async with recording_gateway() as gateway, recording_gateway() as elsewhere:
        yield Origins(gateway, elsewhere)

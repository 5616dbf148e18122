"""The real gateway, with failures of a server in front of it or of all its workers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Literal

from yarl import URL

from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    SmgGateway,
    canned,
    completion,
    recording_gateway,
    smg_gateway,
    stream,
)

from ..turns import assert_keys
from .serving import SESSIONS

Fault = Callable[[Call], Answer]
Well = Callable[[Call], AsyncGenerator[bytes, None]]
Where = Literal["the gateway", "its workers"]

# The gateway must not retry or give up a worker, so that each failure reaches the session server.
ARGS = ("--disable-retries", "--disable-circuit-breaker")
_FRAMING = {b"connection", b"content-length", b"transfer-encoding"}


@dataclass(frozen=True)
class Failing:
    """The servers that can fail, and the URL that the session server calls.

    ``well`` is how they answer when they don't fail.
    """

    url: URL
    recorders: Sequence[Recorder]
    well: Well
    smg: SmgGateway

    def answer(self, fault: Fault) -> None:
        """Answer turns with ``fault``."""
        for recorder in self.recorders:
            recorder.answer = lambda call: fault(call) if call.method == "POST" else canned(call)

    def assert_keys(self, *, plugin: bool) -> None:
        """Assert that each turn had its session's key, and each session stayed on its worker."""
        assert_keys([call for each in self.recorders for call in each.calls], plugin=plugin)
        assert_keys([call for each in self.smg.workers for call in each.calls], plugin=plugin)
        if plugin:
            for session_id in SESSIONS:
                self.smg.assert_pinned(session_id)

    def forget(self) -> None:
        """Forget the calls received so far."""
        for recorder in (*self.recorders, *self.smg.workers):
            recorder.calls.clear()


@asynccontextmanager
async def failing_gateway(where: Where) -> AsyncIterator[Failing]:
    """Run the real gateway; a server in front of it, or its workers, can be made to fail."""
    async with smg_gateway(3, policy="manual", args=ARGS) as smg, recording_gateway() as front:
        workers = Failing(smg.url, smg.workers, _named, smg)
        workers.answer(_named)
        if where == "its workers":
            yield workers
        else:
            yield Failing(front.url, [front], lambda call: _relay(smg.url, call), smg)


async def _named(call: Call) -> AsyncGenerator[bytes, None]:
    """Answer with the id of the session that the body names."""
    turn = call.json()
    if not turn.get("stream"):
        yield completion(turn["user"])
        return
    async for piece in stream(turn["user"]):
        yield piece


async def _relay(gateway: URL, call: Call) -> AsyncGenerator[bytes, None]:
    """Pass on a call unchanged, and its answer piece by piece."""
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    with closing(writer):
        kept = [line for line in call.header_lines if line.split(b":")[0].lower() not in _FRAMING]
        framing = (b"Connection: close", b"Content-Length: %d" % len(call.body))
        writer.write(b"\r\n".join((call.start_line, *kept, *framing, b"", call.body)))
        while piece := await reader.read(2**16):
            yield piece

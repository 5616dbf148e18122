"""What the tests of the recipes have in common: turns of several sessions, played at once."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.testing import Recorder, free_port
from harness.agents import chat
from harness.processes import answering, local_url

from ..turns import assert_keys, turns_of

SESSIONS = [f"s-{number}" for number in range(8)]
TURNS = 3


async def play(url: URL, call: Callable[[str], Mapping[str, Any]]) -> None:
    """Play all sessions at once; ``call`` gives what ``ClientSession.post`` takes for a turn."""

    async def session(session_id: str) -> None:
        # A connection of its own for each turn: it may come to any process of the server.
        async with ClientSession(url, connector=TCPConnector(force_close=True)) as agent:
            for _ in range(TURNS):
                async with agent.post(**call(session_id)) as response:
                    assert response.status == 200, await response.text()
                    await response.read()

    await asyncio.gather(*map(session, SESSIONS))


def asks(ask: Callable[[web.Request], Awaitable[web.Response]], gateway: URL) -> web.Application:
    """Return a server that asks an SDK, whose ClientSession is its own, in each turn."""
    app = web.Application()
    app.router.add_post("/sessions/{session_id}/ask", ask)
    setup(app, {"gateway": str(gateway), "instrument": True})
    return app


async def play_asks(url: URL, *, stream: bool) -> None:
    """Play turns of such a server."""
    await play(
        url,
        lambda session_id: {
            "url": f"/sessions/{session_id}/ask",
            "json": chat(session_id, stream=stream),
        },
    )


def assert_no_crosstalk(gateway: Recorder, turns: int = TURNS) -> None:
    """Assert that each turn carried the key of the session that its body names, and no other."""
    played = turns_of(gateway)
    assert len(played) == len(SESSIONS) * turns
    assert_keys(played)
    for session_id in SESSIONS:
        gateway.assert_pinned(session_id, turns=turns)


@asynccontextmanager
async def serving(argv: Callable[[int], list[str]]) -> AsyncIterator[URL]:
    """Run Python, as ``argv`` has it for a port, until the block ends; then it gets SIGTERM."""
    port = free_port()
    url = local_url(port)
    async with answering(url, sys.executable, *argv(port)) as process:
        yield url
        os.kill(process.pid, signal.SIGTERM)
        await process.wait()

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
from aiohttp_smg_routing.testing import Recorder, child_process, free_port

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


def chat(session_id: str, **fields: Any) -> dict[str, Any]:
    """Return the body of a turn, with whose it is."""
    messages = [{"role": "user", "content": session_id}]
    return {"model": "stub", "messages": messages, "user": session_id, **fields}


def assert_no_crosstalk(gateway: Recorder, turns: int = TURNS) -> None:
    """Assert that each turn carried the key of the session that its body names, and no other."""
    played = [call for call in gateway.calls if call.method == "POST"]
    assert len(played) == len(SESSIONS) * turns
    for call in played:
        assert call.keys == [call.json()["messages"][0]["content"].encode()]
    for session_id in SESSIONS:
        gateway.assert_pinned(session_id, turns=turns)


@asynccontextmanager
async def serving(argv: Callable[[int], list[str]]) -> AsyncIterator[URL]:
    """Run Python, as ``argv`` has it for a port, until the block ends; then it gets SIGTERM."""
    port = free_port()
    url = URL(f"http://127.0.0.1:{port}")
    async with ClientSession() as client:

        async def ready() -> bool:
            async with client.get(url):
                return True

        async with child_process(sys.executable, *argv(port), ready=ready) as process:
            yield url
            os.kill(process.pid, signal.SIGTERM)
            await process.wait()

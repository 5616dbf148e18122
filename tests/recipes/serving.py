"""Helpers for the tests of the recipes: they play turns of several sessions at once."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

from aiohttp_smg_routing import RoutingConfig, setup
from aiohttp_smg_routing.testing import Recorder, SmgGateway, free_port
from harness.agents import CHAT_PATH, chat
from harness.processes import answering, local_url

from ..turns import answered, assert_keys, turns_of

SESSIONS = [f"s-{number}" for number in range(8)]
TURNS = 3


def by_body(session_id: str) -> Mapping[str, Any]:
    """Return the arguments of ``post()`` for a turn whose body names its session."""
    return {"path": CHAT_PATH, "json": chat(session_id)}


async def play(url: URL, call: Callable[[str], Mapping[str, Any]]) -> None:
    """Play all sessions at once; ``call`` returns the arguments of ``post()`` for a session."""

    async def session(session_id: str) -> None:
        # Each turn has a new connection, which any process of the server may accept.
        async with ClientSession(url, connector=TCPConnector(force_close=True)) as agent:
            for _ in range(TURNS):
                await answered(agent, **call(session_id))

    await asyncio.gather(*map(session, SESSIONS))


def clients_of(sdk: str) -> Mapping[str, Callable[[], Any]]:
    """Return what makes each client that an SDK may have; importing one takes seconds."""
    of_aiohttp = "DefaultAioHttpClient"
    return {"default": lambda: None, "aiohttp": lambda: getattr(import_module(sdk), of_aiohttp)()}


def asks(ask: Callable[[web.Request], Awaitable[web.Response]], gateway: URL) -> web.Application:
    """Return a server that calls an SDK in each turn; the SDK makes its own ClientSession."""
    app = web.Application()
    app.router.add_post("/sessions/{session_id}/ask", ask)
    setup(app, {"gateway": str(gateway), "instrument": True})
    return app


async def play_asks(url: URL, *, stream: bool) -> None:
    """Play turns of a server of ``asks()``."""
    await play(
        url,
        lambda session_id: {
            "path": f"/sessions/{session_id}/ask",
            "json": chat(session_id, stream=stream),
        },
    )


def assert_all_pinned(gateway: Recorder, turns: int = TURNS) -> None:
    """Assert that each turn carried the key of the session that its body names, and no other."""
    played = turns_of(gateway)
    assert len(played) == len(SESSIONS) * turns
    assert_keys(played)
    for session_id in SESSIONS:
        gateway.assert_pinned(session_id, turns=turns)


async def assert_gateway_pinned(smg: SmgGateway, config: RoutingConfig | None = None) -> None:
    """Assert that each session had its key and one worker, and that the gateway used the key."""
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS, config=config)
    count = len(SESSIONS)
    assert +await smg.branches() == {"vacant": count, "occupied_hit": count * (TURNS - 1)}


@asynccontextmanager
async def serving(argv: Callable[[int], list[str]]) -> AsyncIterator[URL]:
    """Run Python with ``argv(port)`` until the block ends, then send it SIGTERM."""
    port = free_port()
    url = local_url(port)
    async with answering(url, sys.executable, *argv(port)) as process:
        yield url
        os.kill(process.pid, signal.SIGTERM)
        await process.wait()

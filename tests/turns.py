"""Helpers to play turns, and to see where they arrived and what the plugin has logged."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient
from yarl import URL

from aiohttp_smg_routing import routing_session
from aiohttp_smg_routing.testing import Call, Recorder
from harness.agents import CHAT, chat

PATH = f"/sessions/s-1/{CHAT}"
"""The path of a turn of session ``s-1`` on a session server."""

if TYPE_CHECKING:
    Client = TestClient[web.Request, web.Application]  # generic since aiohttp 3.11


async def answered(client: "Client | ClientSession", path: str | URL, **how: Any) -> None:
    """Call ``path`` by POST; assert that the call is answered, and read the answer."""
    async with client.post(path, **how) as response:
        assert response.status == 200, await response.text()
        await response.read()


async def turn(
    client: "Client | ClientSession", session_id: str, turns: int = 1, **fields: object
) -> None:
    """Play turn number ``turns`` of a session; assert that it is answered."""
    body = chat(session_id, turns, **fields)
    await answered(client, f"/sessions/{session_id}/{CHAT}", json=body)


async def play_sessions(
    client: "Client | ClientSession", sessions: Iterable[str], turns: int = 1
) -> None:
    """Play turns of sessions through a session server, each session at its own pace."""

    async def session(session_id: str) -> None:
        for number in range(1, turns + 1):
            await turn(client, session_id, number)

    await asyncio.gather(*map(session, sessions))


async def play_sessions_at(server: URL, sessions: Iterable[str], turns: int = 1) -> None:
    """Play them through the session server at this URL."""
    async with ClientSession(server) as client:
        await play_sessions(client, sessions, turns)


async def keys(
    session: ClientSession, gateway: Recorder, session_id: str | None = "s-1"
) -> list[bytes]:
    """Call the gateway in a session; return the keys that arrived."""
    with routing_session(session_id):
        async with session.post(gateway.chat):
            return gateway.last.keys


def turns_of(*recorders: Recorder) -> list[Call]:
    """Return the turns that arrived, without the gateway's own requests to its workers."""
    return [call for each in recorders for call in each.calls if call.method == "POST"]


def served(*workers: Recorder) -> Mapping[str, Counter[URL]]:
    """Return each session's number of turns by worker, from the bodies of the turns."""
    found: dict[str, Counter[URL]] = defaultdict(Counter)
    for worker in workers:
        for call in turns_of(worker):
            found[call.json()["user"]][worker.url] += 1
    return found


def assert_keys(calls: Iterable[Call], *, plugin: bool = True) -> None:
    """Assert that each turn carried the key of the session that its body names, and no other."""
    turns = [call for call in calls if call.method == "POST"]
    assert turns
    for call in turns:
        assert call.keys == ([call.json()["user"].encode()] if plugin else [])


def forget(*recorders: Recorder) -> None:
    """Forget the calls that arrived."""
    for recorder in recorders:
        recorder.calls.clear()


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """Return the messages that the plugin has logged, from ``level`` up."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("aiohttp_smg_routing.") and record.levelno >= level
    ]

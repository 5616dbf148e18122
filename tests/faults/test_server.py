"""The example session server, as a process, is stopped or killed during turns."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import ClientSession, TCPConnector
from yarl import URL

from aiohttp_smg_routing.testing import smg_gateway
from harness.proc import HAS_PROC, processes_in, until_refused
from harness.servers import SessionServer, complaints, session_server

from ..turns import assert_keys, turns_of
from ..waiting import soon, until
from .serving import SESSIONS, Agents, holding


@asynccontextmanager
async def watched_process(
    folder: Path, gateway: URL, *, plugin: bool = True
) -> AsyncIterator[tuple[SessionServer, Agents]]:
    """Run the session server with all sessions; fail if it logs errors or leaves things."""
    async with (
        session_server(
            gateway,
            folder=folder,
            env={"TMPDIR": str(folder), "PYTHONWARNINGS": "error"},
            enabled=plugin,
        ) as server,
        ClientSession(connector=TCPConnector(limit=0)) as client,
    ):
        assert server.process.pid in processes_in(folder) or not HAS_PROC
        yield server, await Agents(server.url, client).begin()
        await soon(server.process.wait())
        assert processes_in(folder) == {}
    assert complaints(server.log) == []
    assert sorted(os.listdir(folder)) == ["server.log", "settings.toml"]


async def stop_in_the_midst(folder: Path, *, plugin: bool, stream: bool) -> list[tuple[int, bool]]:
    async with AsyncExitStack() as stack:
        smg = await stack.enter_async_context(smg_gateway(3, policy="manual"))
        release = stack.enter_context(holding(*smg.workers))
        async with watched_process(folder, smg.url, plugin=plugin) as (server, agents):
            await agents.all_answered(1)
            second = asyncio.create_task(agents.all(2, stream=stream))
            await until(lambda: len(turns_of(*smg.workers)) == 2 * len(SESSIONS))
            os.kill(server.process.pid, signal.SIGTERM)
            await soon(until_refused(server.url))
            release.set()
            got = await second
            assert await soon(server.process.wait()) == 0
        assert_keys(turns_of(*smg.workers), plugin=plugin)
        if plugin:
            assert +await smg.branches() == {
                "vacant": len(SESSIONS),
                "occupied_hit": len(SESSIONS),
            }
    return [(got.status or 0, got.whole) for got in got.values()]


async def test_sigterm_lets_the_turns_under_way_come_to_their_end(tmp_path: Path) -> None:
    for plugin in (True, False):
        for stream in (True, False):
            got = await stop_in_the_midst(tmp_path, plugin=plugin, stream=stream)
            assert got == [(200, True)] * len(SESSIONS)


async def test_after_sigkill_a_new_server_goes_on_with_the_same_pins(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        args = ["--assignment-mode", "min_group"]
        smg = await stack.enter_async_context(smg_gateway(3, policy="manual", args=args))
        release = stack.enter_context(holding(*smg.workers))
        async with watched_process(tmp_path, smg.url) as (server, agents):
            await agents.all_answered(1)
            second = asyncio.create_task(agents.all(2))
            await until(lambda: len(turns_of(*smg.workers)) == 2 * len(SESSIONS))
            server.process.kill()
            got = await second
            assert {(got.status, got.whole) for got in got.values()} == {(None, False)}
            before = {each: agent.worker for each, agent in agents.by_id.items()}
        release.set()
        async with watched_process(tmp_path, smg.url) as (server, agents):
            await agents.all_answered(3)
            await agents.all_answered(4)
            assert {each: agent.worker for each, agent in agents.by_id.items()} == before
            assert await soon(server.stop()) == 0
        for session_id in SESSIONS:
            smg.assert_pinned(session_id, turns=4)
        pinned = len(SESSIONS)
        assert +await smg.branches() == {"vacant": pinned, "occupied_hit": 3 * pinned}
    assert_keys(turns_of(*smg.workers))

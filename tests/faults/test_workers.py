"""Workers of the real gateway die, come back and are added, with turns in flight."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Recorder, SmgGateway, smg_gateway
from harness.agents import Reply, conversation
from harness.workers import Worker, recorders, worker_processes

from ..turns import assert_keys, turns_of
from ..waiting import soon, until
from .serving import (
    SESSIONS,
    Agents,
    Server,
    assert_keys_of,
    is_failure_of_the_gateway,
    watched_server,
)

# The gateway tries a worker again after a second instead of a minute.
ARGS = ("--assignment-mode", "min_group", "--cb-timeout-duration-secs", "1")


@asynccontextmanager
async def behind_the_gateway(
    workers: Sequence[Worker | Recorder], policy: str = "manual", *, plugin: bool = True
) -> AsyncIterator[tuple[Server, SmgGateway]]:
    """Run the gateway and the session server with ``workers``."""
    args = ARGS if policy == "manual" else ARGS[2:]
    async with (
        smg_gateway([worker.url for worker in workers], policy=policy, args=args) as smg,
        watched_server(smg.url, plugin=plugin) as server,
    ):
        yield server, smg


@asynccontextmanager
async def before_processes(
    workers: Sequence[Worker], *, plugin: bool
) -> AsyncIterator[tuple[Server, Agents]]:
    """Run the gateway and the session server with ``workers``; check the keys at the end."""
    for worker in workers:
        os.truncate(worker.file, 0)  # what they have received behind an earlier gateway
    async with behind_the_gateway(workers, plugin=plugin) as (server, _):
        yield server, server.agents
    assert_keys_of(workers, plugin=plugin)


def sessions_of(server: Server, worker: Worker | Recorder) -> list[str]:
    """Return the sessions whose last answer came from this worker."""
    name = str(worker.url.origin())
    return [each for each, agent in server.agents.by_id.items() if agent.worker == name]


def count_received(worker: Worker) -> int:
    return sum(1 for _ in worker.received())


def assert_the_ledger_is_right(server: Server, *, plugin: bool) -> None:
    """Assert that the ledger has each session's worker, or nothing without the plugin."""
    seen = {each: agent.worker for each, agent in server.agents.by_id.items()}
    assert server.pinned == (seen if plugin else {})


async def until_all_are_answered(server: Server, number: int) -> None:
    """Play a turn until all sessions get an answer; failures must be the gateway's own."""

    async def play() -> None:
        while True:
            turns = await server.agents.all(number)
            if all(got.answered for got in turns.values()):
                return
            assert_failures_are_the_gateways(turns.values())

    await soon(play())


def assert_failures_are_the_gateways(turns: Iterable[Reply]) -> None:
    assert [got for got in turns if not (got.answered or is_failure_of_the_gateway(got))] == []


async def kill_and_restart_one(workers: Sequence[Worker], *, plugin: bool, stream: bool) -> None:
    async with before_processes(workers, plugin=plugin) as (server, agents):
        await agents.all_answered(1)
        dead = max(workers, key=lambda worker: len(sessions_of(server, worker)))
        before = len(list(dead.received()))
        turns = {
            each: asyncio.create_task(agent.turn(conversation(2), stream=stream, hold=dead.port))
            for each, agent in agents.by_id.items()
        }
        await until(lambda: sum(map(count_received, workers)) == 2 * len(SESSIONS))
        held = {turn.user for turn in list(dead.received())[before:]}
        if plugin:
            assert held == set(sessions_of(server, dead))
        await dead.kill()
        got = {each: await soon(turn) for each, turn in turns.items()}
        # With and without the plugin, only turns that the worker had begun can fail, and agents
        # get an error.
        assert {each for each, turn in got.items() if not turn.answered} <= held
        assert_failures_are_the_gateways(got.values())
        kept = {each: 1 + turn.answered for each, turn in got.items()}
        assert await agents.turns_kept() == kept
        await until_all_are_answered(server, 3)
        assert sessions_of(server, dead) == []
        assert_the_ledger_is_right(server, plugin=plugin)
        await dead.start()
        await until_all_are_answered(server, 4)
        await agents.all_answered(5)
        assert_the_ledger_is_right(server, plugin=plugin)


async def test_a_worker_is_killed_and_restarted(tmp_path: Path) -> None:
    async with worker_processes(tmp_path, 3) as workers:
        for plugin, stream in product((True, False), (False, True)):
            await kill_and_restart_one(workers, plugin=plugin, stream=stream)


@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "without"])
@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_a_worker_is_added(policy: str, plugin: bool) -> None:
    async with (
        recorders(3) as workers,
        behind_the_gateway(workers[:2], policy, plugin=plugin) as (server, smg),
    ):
        agents, added = server.agents, workers[2]
        await agents.all_answered(1)
        before = {each: agent.worker for each, agent in agents.by_id.items()}
        stop = asyncio.Event()

        async def keep_playing(session_id: str) -> None:
            while not stop.is_set():
                assert (await agents.by_id[session_id].turn(conversation(2))).answered

        playing = asyncio.gather(*map(keep_playing, SESSIONS))
        try:
            await soon(add(smg, added))
        finally:
            stop.set()
            await soon(playing)
        await agents.all_answered(3)
        if plugin:
            moved = {each for each, agent in agents.by_id.items() if agent.worker != before[each]}
            assert set(sessions_of(server, added)) == moved
            assert server.pins.summary().moved == (len(moved) if policy != "manual" else 0)
            assert server.pins.summary().failed == 0
        assert_the_ledger_is_right(server, plugin=plugin)
        # New sessions also come to the new worker.
        await agents.begin(f"new-{number}" for number in range(30))
        await agents.all_answered(1)
        assert any(each.startswith("new-") for each in sessions_of(server, added))
        assert_the_ledger_is_right(server, plugin=plugin)
    assert_keys(turns_of(*workers), plugin=plugin)


async def add(smg: SmgGateway, worker: Recorder) -> None:
    """Add a worker to the gateway; return once the gateway considers it healthy."""
    name = str(worker.url.origin())
    async with ClientSession() as client:
        async with client.post(smg.url / "workers", json={"url": name}) as response:
            assert response.status == 202, await response.text()
        healthy: set[str] = set()
        while name not in healthy:
            async with client.get(smg.url / "workers") as response:
                known = (await response.json())["workers"]
            healthy = {each["url"] for each in known if each["is_healthy"]}


async def kill_and_restart_all(workers: Sequence[Worker], *, plugin: bool) -> None:
    async with before_processes(workers, plugin=plugin) as (server, agents):
        await agents.all_answered(1)
        turns = [
            asyncio.create_task(agent.turn(conversation(2), hold=True))
            for agent in agents.by_id.values()
        ]
        await until(lambda: sum(map(count_received, workers)) == 2 * len(SESSIONS))
        await asyncio.gather(*(worker.kill() for worker in workers))
        got = [await soon(turn) for turn in turns]
        got += (await agents.all(3)).values()
        assert not any(turn.answered for turn in got)
        assert_failures_are_the_gateways(got)
        assert await agents.turns_kept() == dict.fromkeys(SESSIONS, 1)
        await asyncio.gather(*(worker.start() for worker in workers))
        await until_all_are_answered(server, 4)
        await agents.all_answered(5)
        assert_the_ledger_is_right(server, plugin=plugin)


async def test_all_workers_are_gone_and_come_back(tmp_path: Path) -> None:
    async with worker_processes(tmp_path, 2) as workers:
        for plugin in (True, False):
            await kill_and_restart_all(workers, plugin=plugin)

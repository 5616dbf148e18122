"""The ledger against the real gateway: what it counts is what the gateway did."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from aiohttp import TCPConnector, web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import PINS, PinSummary
from aiohttp_smg_routing.testing import free_port, recording_gateway, smg_gateway

from ..conftest import session_server
from ..workers import chat, names_workers, worker_processes

if TYPE_CHECKING:
    Client = TestClient[web.Request, web.Application]  # generic since aiohttp 3.11


async def turn(client: "Client", sessions: Iterable[str]) -> None:
    """Play a turn of every session."""

    async def play(session_id: str) -> None:
        path = f"/sessions/{session_id}/v1/chat/completions"
        async with client.post(path, json=chat(session_id)) as response:
            assert response.status == 200, await response.text()

    await asyncio.gather(*map(play, sessions))


@names_workers
async def test_when_a_worker_is_killed_exactly_its_sessions_move_once(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = [f"s-{number}" for number in range(30)]
    args = ["--assignment-mode", "min_group"]
    async with (
        worker_processes(3) as processes,
        smg_gateway(list(processes), policy="manual", args=args) as smg,
    ):
        app = session_server(smg.url)
        client = await aiohttp_client(app)
        for _ in range(3):
            await turn(client, sessions)
        pins = app[PINS]
        dead = next(iter(processes))
        lost = {key for key, pin in pins.sessions().items() if pin.worker == str(dead).rstrip("/")}
        assert 0 < len(lost) < len(sessions)
        processes[dead].kill()
        await processes[dead].wait()
        for _ in range(3):
            await turn(client, sessions)
        moved = {key for key, pin in pins.sessions().items() if pin.moves}
        assert moved == lost
        moves = len(lost)
        assert pins.summary() == PinSummary(first=30, kept=150 - moves, moved=moves, sessions=30)
        assert (await smg.branches())["occupied_miss"] == moves
    records = [r.getMessage() for r in caplog.records if "moved from" in r.getMessage()]
    assert sorted(record.split()[1] for record in records) == sorted(lost)


@names_workers
async def test_the_moves_after_a_gateway_has_lost_its_sticky_map_are_seen(
    aiohttp_client: AiohttpClient,
) -> None:
    sessions = [f"s-{number}" for number in range(40)]
    port = free_port()
    app = session_server(URL(f"http://127.0.0.1:{port}"))
    client = await aiohttp_client(app)
    served: defaultdict[str, list[URL]] = defaultdict(list)  # the worker that each gateway chose
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(recording_gateway()) for _ in range(3)]
        for _ in range(2):  # a gateway, and the one that takes its place
            urls = [worker.url for worker in workers]
            async with smg_gateway(urls, policy="manual", port=port) as smg:
                for _ in range(2):
                    await turn(client, sessions)
                assert (await smg.branches())["vacant"] == len(sessions)
            for worker in workers:
                for user in {call.json()["user"] for call in worker.calls if call.body}:
                    served[user].append(worker.url)
                worker.calls.clear()
        moves = sum(first != second for first, second in served.values())
    summary = app[PINS].summary()
    assert summary == PinSummary(first=40, kept=120 - moves, moved=moves, sessions=40)
    assert moves > 0  # of 40 sessions each stays with a chance of one third


@names_workers
async def test_fifty_thousand_turns_are_counted_to_the_last(aiohttp_client: AiohttpClient) -> None:
    sessions, turns = 5000, 10
    async with (
        worker_processes(3) as processes,
        smg_gateway(list(processes), policy="manual") as smg,
    ):
        app = session_server(smg.url)
        client = await aiohttp_client(app, connector=TCPConnector(limit=64))

        async def play(session_id: str) -> None:
            for _ in range(turns):
                await turn(client, [session_id])

        await asyncio.gather(*(play(f"s-{number}") for number in range(sessions)))
        assert +await smg.branches() == {
            "vacant": sessions,
            "occupied_hit": sessions * (turns - 1),
        }
    assert app[PINS].summary() == PinSummary(
        first=sessions, kept=sessions * (turns - 1), sessions=sessions
    )
    assert sum(app[PINS].workers().values()) == sessions

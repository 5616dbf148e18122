"""The ledger's counts agree with what the real gateway did."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import ROUTING, PinSummary, Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import SmgGateway, StartSmgGateway, free_port, recording_gateway
from aiohttp_smg_routing.testing import smg_gateway as run_smg_gateway
from harness.agents import CHAT, chat
from harness.processes import local_url
from harness.proxies import pinned_server
from harness.workers import worker_processes

from ..smg import names_workers
from ..turns import play_sessions


@names_workers
async def test_when_a_worker_is_killed_exactly_its_sessions_move_once(
    tmp_path: Path, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = [f"s-{number}" for number in range(30)]
    args = ["--assignment-mode", "min_group"]
    async with (
        worker_processes(tmp_path, 3) as workers,
        run_smg_gateway([worker.url for worker in workers], policy="manual", args=args) as smg,
    ):
        app = pinned_server(smg.url)
        client = await aiohttp_client(app)
        for _ in range(3):
            await play_sessions(client, sessions)
        pins = app[ROUTING].pins
        dead = workers[0]
        lost = {pin.session for pin in pins.sessions() if pin.worker == str(dead.url.origin())}
        assert 0 < len(lost) < len(sessions)
        await dead.kill()
        for _ in range(3):
            await play_sessions(client, sessions)
        moved = {pin.session for pin in pins.sessions() if pin.moves}
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
    app = pinned_server(local_url(port))
    client = await aiohttp_client(app)
    served: defaultdict[str, list[URL]] = defaultdict(list)  # the worker that each gateway chose
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(recording_gateway()) for _ in range(3)]
        for _ in range(2):  # a gateway, then its replacement
            urls = [worker.url for worker in workers]
            async with run_smg_gateway(urls, policy="manual", port=port) as smg:
                for _ in range(2):
                    await play_sessions(client, sessions)
                assert (await smg.branches())["vacant"] == len(sessions)
            for worker in workers:
                for user in {call.json()["user"] for call in worker.calls if call.body}:
                    served[user].append(worker.url)
                worker.calls.clear()
        moves = sum(first != second for first, second in served.values())
    summary = app[ROUTING].pins.summary()
    assert summary == PinSummary(first=40, kept=120 - moves, moved=moves, sessions=40)
    assert moves > 0  # each session stays by a chance of one third


@names_workers
async def test_turns_at_once_are_counted_to_the_last(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    sessions, turns = 200, 5  # the soak plays 10,000 sessions
    async with (
        worker_processes(tmp_path, 3) as workers,
        run_smg_gateway([worker.url for worker in workers], policy="manual") as smg,
    ):
        app = pinned_server(smg.url)
        client = await aiohttp_client(app, connector=TCPConnector(limit=64))
        await play_sessions(client, (f"s-{number}" for number in range(sessions)), turns)
        assert +await smg.branches() == {
            "vacant": sessions,
            "occupied_hit": sessions * (turns - 1),
        }
    assert app[ROUTING].pins.summary() == PinSummary(
        first=sessions, kept=sessions * (turns - 1), sessions=sessions
    )
    assert sum(app[ROUTING].pins.workers().values()) == sessions


async def play_rounds(
    routing: Routing, gateways: Sequence[SmgGateway], sessions: Sequence[str], rounds: int
) -> dict[str, list[str]]:
    """Play a turn of each session at each gateway in turn; return the workers that served it."""
    served: dict[str, list[str]] = {session_id: [] for session_id in sessions}
    hooks = [routing.trace_config()]
    async with ClientSession(raise_for_status=True, trace_configs=hooks) as session:
        for _, session_id, smg in itertools.product(range(rounds), sessions, gateways):
            with routing_session(session_id):
                url = smg.url / CHAT
                async with session.post(url, json=chat(session_id)) as response:
                    served[session_id].append(response.headers["X-SMG-Routed-Worker-Id"])
    return served


@names_workers
async def test_gateways_with_workers_of_their_own_pin_each_for_itself(
    smg_gateway: StartSmgGateway,
) -> None:
    sessions = [f"s-{number}" for number in range(6)]
    gateways = [await smg_gateway(2, policy="manual") for _ in range(2)]
    routing = Routing(RoutingConfig([smg.url for smg in gateways]))
    served = await play_rounds(routing, gateways, sessions, rounds=4)
    assert routing.pins.summary() == PinSummary(first=12, kept=36, sessions=6)
    for session_id in sessions:
        [at_first, at_second] = routing.pins.of(session_id)
        assert [at_first.worker, at_second.worker] * 4 == served[session_id]
        assert [at_first.gateway, at_second.gateway] == [str(smg.url) for smg in gateways]


@names_workers
async def test_manual_gateways_before_the_same_workers_show_the_sessions_that_they_split(
    smg_gateway: StartSmgGateway,
) -> None:
    sessions = [f"s-{number}" for number in range(20)]
    first = await smg_gateway(2, policy="manual")
    workers = [worker.url for worker in first.workers]
    gateways = [first, await smg_gateway(workers, policy="manual")]
    routing = Routing(RoutingConfig([smg.url for smg in gateways]))
    # After the first round the ledger knows that the gateways share their workers.
    await play_rounds(routing, gateways, sessions, rounds=2)
    before = routing.pins.summary()
    served = await play_rounds(routing, gateways, sessions, rounds=3)
    after = routing.pins.summary()
    split = [session_id for session_id in sessions if len(set(served[session_id])) == 2]
    assert 0 < len(split) < len(sessions)  # each splits by a chance of one half
    assert after.moved - before.moved == 6 * len(split)
    assert after.kept - before.kept == 6 * (len(sessions) - len(split))
    assert [pin.session for pin in routing.pins.sessions()] == sessions
    assert {pin.session for pin in routing.pins.sessions() if pin.moves} == set(split)

"""The pin, on the real SMG gateway: what its workers received, and what it counts itself."""

import asyncio

import pytest
from aiohttp import ClientSession, TCPConnector
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, routing_session, routing_trace_config
from aiohttp_smg_routing.testing import SmgGateway, smg_gateway

from .conftest import session_server
from .wire import Wire
from .workers import Workers, chat, stub_workers

SESSIONS = 200
TURNS = 6
AT_A_TIME = 50


async def play(
    gateway: SmgGateway, aiohttp_client: AiohttpClient, workers: Workers, enabled: bool = True
) -> None:
    """Play every session through a session server that has the plugin."""
    client = await aiohttp_client(
        session_server(Wire(gateway.url), enabled=enabled), connector=TCPConnector(limit=AT_A_TIME)
    )

    async def session(session_id: str) -> None:
        for turn in range(1, TURNS + 1):
            path = f"/sessions/{session_id}/v1/chat/completions"
            async with client.post(path, json=chat(session_id, turn)) as response:
                assert response.status == 200, await response.text()

    await asyncio.gather(*(session(f"s-{number}") for number in range(SESSIONS)))
    assert len(workers.served) == SESSIONS
    assert {len(served) for served in workers.served.values()} == {TURNS}


def stayed(workers: Workers) -> int:
    return sum(len(set(served)) == 1 for served in workers.served.values())


async def test_manual_keeps_every_session_on_one_worker(aiohttp_client: AiohttpClient) -> None:
    async with (
        stub_workers(3) as workers,
        smg_gateway(workers.urls, policy="manual", args=["--assignment-mode", "min_group"]) as smg,
    ):
        await play(smg, aiohttp_client, workers)
        assert stayed(workers) == SESSIONS
        assert workers.keys == {session_id: {session_id} for session_id in workers.keys}
        assert len({served[0] for served in workers.served.values()}) == 3
        # `no_routing_id` and every other branch: not once.
        branches = await smg.branches()
        assert +branches == {"vacant": SESSIONS, "occupied_hit": SESSIONS * (TURNS - 1)}


async def test_consistent_hashing_keeps_every_session_on_one_worker(
    aiohttp_client: AiohttpClient,
) -> None:
    async with (
        stub_workers(3) as workers,
        smg_gateway(workers.urls, policy="consistent_hashing") as smg,
    ):
        await play(smg, aiohttp_client, workers)
        assert stayed(workers) == SESSIONS
        assert +await smg.branches() == {"routing_key_hit": SESSIONS * TURNS}


async def test_a_policy_that_does_not_route_on_the_key_is_unharmed(
    aiohttp_client: AiohttpClient,
) -> None:
    async with (
        stub_workers(3) as workers,
        smg_gateway(workers.urls, policy="cache_aware") as smg,
    ):
        await play(smg, aiohttp_client, workers)  # asserts that every call is answered
        branches = await smg.branches()
        assert branches["tree_match"] > 0
        assert sum(branches.values()) == SESSIONS * TURNS
        assert not {"vacant", "occupied_hit", "no_routing_id"} & branches.keys()


async def test_without_the_plugin_the_same_load_is_not_pinned(
    aiohttp_client: AiohttpClient,
) -> None:
    async with stub_workers(3) as workers, smg_gateway(workers.urls, policy="manual") as smg:
        await play(smg, aiohttp_client, workers, enabled=False)
        assert stayed(workers) < SESSIONS
        assert workers.keys == {session_id: {None} for session_id in workers.keys}
        assert +await smg.branches() == {"no_routing_id": SESSIONS * TURNS}


ODD_IDS = [
    "x" * 128,
    "x" * 129,
    "x" * 100_000,
    "é",
    "会話",
    "a b",
    "a\r\nX-Evil: 1",
    "\0",
    "\x7f",
    "\udcff",
]


@pytest.mark.parametrize(
    ("policy", "branches"),
    [
        ("manual", {"vacant": len(ODD_IDS), "occupied_hit": 4 * len(ODD_IDS)}),
        ("consistent_hashing", {"routing_key_hit": 5 * len(ODD_IDS)}),
    ],
)
async def test_any_session_id_has_a_key_that_the_gateway_takes(
    policy: str, branches: dict[str, int]
) -> None:
    async with (
        stub_workers(2) as workers,
        smg_gateway(workers.urls, policy=policy) as smg,
        ClientSession(trace_configs=[routing_trace_config(RoutingConfig(smg.url))]) as session,
    ):
        for session_id in ODD_IDS:
            async with routing_session(session_id):
                for _ in range(5):
                    body = chat(repr(session_id))
                    url = smg.url / "v1/chat/completions"
                    async with session.post(url, json=body) as response:
                        assert response.status == 200, await response.text()
        assert stayed(workers) == len(ODD_IDS)
        assert +await smg.branches() == branches

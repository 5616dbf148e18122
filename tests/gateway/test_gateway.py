"""Pins on the real SMG gateway, as its workers and its own counters show them."""

import pytest
from aiohttp import ClientSession, TCPConnector
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import SmgGateway, StartSmgGateway
from harness.agents import CHAT, chat
from harness.proxies import pinned_server

from ..smg import SMG
from ..turns import answered, assert_keys, play_sessions, served, turns_of

SESSIONS = [f"s-{number}" for number in range(100)]
TURNS = 6
AT_A_TIME = 30


async def play(smg: SmgGateway, aiohttp_client: AiohttpClient, enabled: bool = True) -> None:
    """Play every session through a session server that has the plugin."""
    client = await aiohttp_client(
        pinned_server(smg.url, enabled=enabled), connector=TCPConnector(limit=AT_A_TIME)
    )
    await play_sessions(client, SESSIONS, TURNS)
    arrived = turns_of(*smg.workers)
    assert len(arrived) == len(SESSIONS) * TURNS
    assert_keys(arrived, plugin=enabled)


async def test_manual_keeps_every_session_on_one_worker(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway
) -> None:
    smg = await smg_gateway(3, policy="manual", args=["--assignment-mode", "min_group"])
    await play(smg, aiohttp_client)
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS)
    assert all(any(call.keys for call in worker.calls) for worker in smg.workers)
    # No other branch counts, such as `no_routing_id`.
    branches = await smg.branches()
    assert +branches == {"vacant": len(SESSIONS), "occupied_hit": len(SESSIONS) * (TURNS - 1)}


async def test_consistent_hashing_keeps_every_session_on_one_worker(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway
) -> None:
    smg = await smg_gateway(3, policy="consistent_hashing")
    await play(smg, aiohttp_client)
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS)
    assert +await smg.branches() == {"routing_key_hit": len(SESSIONS) * TURNS}


async def test_a_policy_that_does_not_route_on_the_key_is_unharmed(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway
) -> None:
    smg = await smg_gateway(3, policy="cache_aware")
    await play(smg, aiohttp_client)  # asserts that every call is answered
    branches = await smg.branches()
    if SMG >= (1, 11):  # older versions don't count the choices of cache_aware
        assert branches["tree_match"] > 0
        assert sum(branches.values()) == len(SESSIONS) * TURNS
    assert not {"vacant", "occupied_hit", "no_routing_id"} & branches.keys()


async def test_without_the_plugin_the_same_load_is_not_pinned(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway
) -> None:
    smg = await smg_gateway(3, policy="manual")
    await play(smg, aiohttp_client, enabled=False)
    assert any(len(workers) > 1 for workers in served(*smg.workers).values())
    assert +await smg.branches() == {"no_routing_id": len(SESSIONS) * TURNS}


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
    smg_gateway: StartSmgGateway, policy: str, branches: dict[str, int]
) -> None:
    smg = await smg_gateway(2, policy=policy)
    config = RoutingConfig(smg.url, prefix="job-7/")
    async with ClientSession(trace_configs=[Routing(config).trace_config()]) as session:
        for session_id in ODD_IDS:
            async with routing_session(session_id):
                for _ in range(5):
                    await answered(session, smg.url / CHAT, json=chat(repr(session_id)))
            smg.assert_pinned(session_id, turns=5, config=config)
    assert +await smg.branches() == branches


MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 16},
    "/generate": {"text": "hello"},
}


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_every_path_that_the_config_names_is_pinned_and_no_other(
    smg_gateway: StartSmgGateway, policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    for path in BODIES:
        config = RoutingConfig(smg.url, paths=path)
        async with ClientSession(trace_configs=[Routing(config).trace_config()]) as session:
            for number in range(5):
                async with routing_session(f"{path}#{number}"):
                    for called in [path] * 4 + [*BODIES.keys() - {path}]:
                        body = {"model": "stub", **BODIES[called]}
                        await answered(session, smg.url.with_path(called), json=body)
                smg.assert_pinned(f"{path}#{number}", turns=4)
    keyed = [call for call in turns_of(*smg.workers) if call.keys]
    assert {call.path for call in keyed} == BODIES.keys()
    assert all(
        call.path == call.keys[0].decode().split("#")[0]
        for call in turns_of(*smg.workers)
        if call.keys
    )

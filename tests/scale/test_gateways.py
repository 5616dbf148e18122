"""Several session servers and gateways: the policies and balancers that keep a session."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from aiohttp_smg_routing.testing import smg_gateway
from harness.proc import until_refused
from harness.workers import recorders

from ..gateways import gateways
from .cluster import (
    SERVERS,
    SESSIONS,
    WORKERS,
    branches,
    on_one_worker,
    pid_of,
    play,
    served_with_keys,
    server_process,
    session_servers,
)
from .front import Balancer, before_gateways

TURNS = 3  # one through each server


async def test_consistent_hashing_any_server_and_any_gateway_find_the_worker() -> None:
    async with (
        recorders(WORKERS) as behind,
        gateways(behind, behind, policy="consistent_hashing") as (first, second),
        session_servers(first.url, second.url, count=SERVERS - 1) as servers,
        server_process(first.url) as other,  # Python's hash() is another one there
    ):
        await play([*servers, other], TURNS)
        assert on_one_worker(behind, TURNS)
        counts = [+await gateway.branches() for gateway in (first, second)]
        assert [set(count) for count in counts] == [{"routing_key_hit"}] * 2  # both got calls
        assert sum(count.total() for count in counts) == len(SESSIONS) * TURNS


async def test_manual_behind_a_hash_of_the_key_keeps_a_session_on_one_gateway_and_one_worker(
    tmp_path: Path, balancer: Balancer
) -> None:
    async with (
        before_gateways(balancer, tmp_path, "manual") as (behind, both, front),
        session_servers(front.url) as servers,
    ):
        await play(servers, TURNS)
        assert on_one_worker(behind, TURNS)
        counts = +await branches(both)
        assert counts == {"vacant": len(SESSIONS), "occupied_hit": len(SESSIONS) * (TURNS - 1)}
        came = await front.gateways(len(SESSIONS) * TURNS)
        assert [len(set(gateways)) for gateways in came.values()] == [1] * len(SESSIONS)
        assert {gateways[0] for gateways in came.values()} == {gateway.url for gateway in both}


async def test_manual_on_two_gateways_splits_sessions_when_each_server_has_its_own() -> None:
    async with (
        recorders(WORKERS) as behind,
        gateways(behind, behind, policy="manual") as both,
        session_servers(*(gateway.url for gateway in both)) as servers,
    ):
        await play(servers, TURNS)
        assert not on_one_worker(behind, TURNS)
        assert_split(len([1 for each in served_with_keys(*behind).values() if len(each) > 1]))
        # Each gateway pinned each session on its own.
        assert (await branches(both))["vacant"] == 2 * len(SESSIONS)


def assert_split(sessions: int) -> None:
    """On average three in four split: the other gateway picks one of four workers at random.

    The chance that all do is 1 in a million. Behind a balancer some sessions see only one gateway.
    """
    assert len(SESSIONS) / 8 < sessions < len(SESSIONS)


async def test_manual_on_two_gateways_splits_sessions_behind_round_robin(
    tmp_path: Path, balancer: Balancer
) -> None:
    async with (
        before_gateways(balancer, tmp_path, "manual", hashing=False) as (behind, _, front),
        session_servers(front.url) as servers,
    ):
        await play(servers, TURNS)
        assert not on_one_worker(behind, TURNS)
        split = [came for came in served_with_keys(*behind).values() if len(came) > 1]
        assert_split(len(split))


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_a_session_server_that_is_killed_and_starts_again_moves_nothing(policy: str) -> None:
    async with (
        recorders(WORKERS) as behind,
        smg_gateway([worker.url for worker in behind], policy=policy) as gateway,
        session_servers(gateway.url, count=SERVERS - 1) as others,
        server_process(gateway.url) as killed,
    ):
        servers = [killed, *others]
        await play(servers, TURNS)
        pid = await pid_of(killed)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(until_refused(killed), 30)
        async with server_process(gateway.url, killed.port) as again:
            assert (again, await pid_of(again) != pid) == (killed, True)
            await play(servers, TURNS)
        assert on_one_worker(behind, 2 * TURNS)

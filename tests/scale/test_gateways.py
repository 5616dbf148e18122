"""Several session servers before several gateways: which policy and balancer keep a session."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator
from io import BytesIO
from pathlib import Path

from aiohttp import ClientSession, ClientTimeout

from aiohttp_smg_routing.testing import Call, stream
from aiohttp_smg_routing.testing.answers import canned

from ..workers import chat
from .cluster import (
    SESSIONS,
    branches,
    forget,
    gateways,
    on_one_worker,
    play,
    served,
    session_servers,
    workers,
)
from .nginx import nginx

TURNS = 6
SILENCE = ClientTimeout(sock_read=30)
HEADERS = {"X-SMG-Routing-Key": "s-1", "Content-Type": "application/json"}


async def test_consistent_hashing_any_server_and_any_gateway_find_the_worker() -> None:
    async with (
        workers() as behind,
        gateways(behind, "consistent_hashing") as (first, second),
        session_servers(first.url, second.url) as servers,
    ):
        await play(servers, TURNS)
        assert on_one_worker(behind, TURNS)
        counts = [+await gateway.branches() for gateway in (first, second)]
        assert [set(count) for count in counts] == [{"routing_key_hit"}] * 2  # both were asked
        assert sum(count.total() for count in counts) == len(SESSIONS) * TURNS


async def test_manual_behind_a_hash_of_the_key_keeps_a_session_on_one_gateway_and_one_worker(
    tmp_path: Path,
) -> None:
    async with (
        workers() as behind,
        gateways(behind, "manual") as both,
        nginx(tmp_path, *(gateway.url for gateway in both)) as front,
        session_servers(front.url) as servers,
    ):
        await play(servers, TURNS)
        assert on_one_worker(behind, TURNS)
        counts = +await branches(both)
        assert counts == {"vacant": len(SESSIONS), "occupied_hit": len(SESSIONS) * (TURNS - 1)}
        came = await front.gateways(len(SESSIONS) * TURNS)
        assert [len(set(gateways)) for gateways in came.values()] == [1] * len(SESSIONS)
        assert {gateways[0] for gateways in came.values()} == {gateway.url for gateway in both}


async def test_a_gateway_that_stops_moves_its_own_sessions_once_and_no_other(
    tmp_path: Path,
) -> None:
    async with (
        workers() as behind,
        gateways(behind, "manual") as (stops, stays),
        nginx(tmp_path, stops.url, stays.url) as front,
        session_servers(front.url) as servers,
    ):
        await play(servers, 2)
        before = served(behind)
        at = {session: came[0] for session, came in (await front.gateways(192)).items()}
        moved = [session for session in SESSIONS if at[session] == stops.url]
        assert 0.2 < len(moved) / len(SESSIONS) < 0.8  # about half
        forget(behind)
        os.kill(stops.process.pid, signal.SIGKILL)
        await stops.process.wait()

        await play(servers, TURNS)  # every turn is answered
        assert on_one_worker(behind, TURNS)  # each that moved settled, too
        after = served(behind)
        stayed = set(SESSIONS) - set(moved)
        assert [
            session for session in stayed if after[session].keys() != before[session].keys()
        ] == []
        assert (await stays.branches())["vacant"] == len(SESSIONS)


async def test_manual_on_two_gateways_splits_sessions_when_each_server_has_its_own() -> None:
    async with (
        workers() as behind,
        gateways(behind, "manual") as both,
        session_servers(*(gateway.url for gateway in both)) as servers,
    ):
        await play(servers, TURNS)
        assert not on_one_worker(behind, TURNS)
        assert_split(len([1 for each in served(behind).values() if len(each) > 1]))
        # Each gateway pinned each session for itself.
        assert (await branches(both))["vacant"] == 2 * len(SESSIONS)


def assert_split(sessions: int) -> None:
    """Three of four on average: the other gateway picks one of four workers at random."""
    assert len(SESSIONS) / 2 < sessions < len(SESSIONS)


async def test_manual_on_two_gateways_splits_sessions_behind_round_robin(tmp_path: Path) -> None:
    async with (
        workers() as behind,
        gateways(behind, "manual") as both,
        nginx(tmp_path, *(gateway.url for gateway in both), hashing=False) as front,
        session_servers(front.url) as servers,
    ):
        await play(servers, TURNS)
        assert not on_one_worker(behind, TURNS)
        split = [came for came in served(behind).values() if len(came) > 1]
        assert_split(len(split))


async def test_a_turn_of_megabytes_reaches_the_gateway_and_a_stream_comes_piece_by_piece(
    tmp_path: Path,
) -> None:
    """The front has limits and buffers of its own."""
    texts = [f"piece-{number}" for number in range(5)]
    seen = asyncio.Semaphore(1)

    async def one_by_one(call: Call) -> AsyncGenerator[bytes, None]:
        async for piece in stream(*texts):
            if b"piece-" in piece:
                await seen.acquire()  # the one before has arrived
            yield piece

    async with (
        workers() as behind,
        gateways(behind, "consistent_hashing") as both,
        nginx(tmp_path, *(gateway.url for gateway in both)) as front,
        ClientSession(headers=HEADERS, timeout=SILENCE) as client,
    ):
        for worker in behind:
            worker.answer = lambda call: one_by_one(call) if call.body else canned(call)
        turn = {**chat("s-1"), "stream": True, "metadata": {"padding": "x" * 2**21}}
        body = BytesIO(json.dumps(turn).encode())
        read = b""
        try:
            async with client.post(front.url / "v1/chat/completions", data=body) as response:
                assert response.status == 200
                for text in texts:
                    while text.encode() not in read:
                        read += await response.content.readany()
                    seen.release()
        finally:
            for _ in texts:  # no worker waits for what did not arrive
                seen.release()

"""How a balancer handles calls, and a gateway that is gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientTimeout
from yarl import URL

from aiohttp_smg_routing.testing import (
    Call,
    Recorder,
    SmgGateway,
    canned,
    failure,
    recording_gateway,
    smg_gateway,
    stream,
)
from harness.agents import CHAT, chat
from harness.proxies import pinned_server
from harness.servers import serve

from ..turns import answered, assert_keys, forget, served, turns_of
from .cluster import (
    SESSIONS,
    branches,
    kill,
    on_one_worker,
    play,
    served_with_keys,
    session_servers,
)
from .envoy import envoy
from .front import Balancer, Front, before_gateways
from .nginx import nginx

TURNS = 3
POLL_SECONDS = 0.25
SILENCE = ClientTimeout(sock_read=30)
HEADERS = {"Content-Type": "application/json"}
KEY = "X-SMG-Routing-Key"


async def sessions_of(gateway: SmgGateway, front: Front, turns: int) -> list[str]:
    """Return the sessions that the front sends to a gateway, after ``turns`` turns of each."""
    came = await front.gateways(len(SESSIONS) * turns)
    found = [session for session in SESSIONS if came[session][0] == gateway.url]
    assert 0.1 < len(found) / len(SESSIONS) < 0.9  # about half
    return found


async def test_a_gateway_that_stops_moves_its_own_sessions_once_and_gets_them_when_it_is_back(
    tmp_path: Path, balancer: Balancer
) -> None:
    async with (
        before_gateways(balancer, tmp_path, "manual") as (behind, (stops, stays), front),
        session_servers(front.url) as servers,
    ):
        await play(servers, 2)
        before = served_with_keys(*behind)
        moved = await sessions_of(stops, front, 2)
        stayed = set(SESSIONS) - set(moved)
        forget(*behind)
        await kill(stops)

        await play(servers, TURNS)  # asserts that every turn is answered
        assert on_one_worker(behind, TURNS)  # sessions that moved stay there
        after = served_with_keys(*behind)
        assert [each for each in stayed if after[each].keys() != before[each].keys()] == []
        assert (await stays.branches())["vacant"] == len(SESSIONS)

        urls = [worker.url for worker in behind]
        async with smg_gateway(urls, policy="manual", port=stops.url.port) as again:
            await asyncio.wait_for(until_back(again, servers, moved), 60)
            assert (await again.branches())["vacant"] == len(moved)  # it pins them anew
            forget(*behind)
            await play(servers, TURNS)
            assert on_one_worker(behind, TURNS)
            assert (await again.branches())["vacant"] == len(moved)  # no other session
            assert (await stays.branches())["vacant"] == len(SESSIONS)


async def until_back(gateway: SmgGateway, servers: Sequence[URL], moved: Sequence[str]) -> None:
    """Play turns of one of the sessions that the gateway had, then of all, until all come to it."""
    for sessions in (moved[:1], moved):
        calls = -1
        while calls != len(sessions):
            await asyncio.sleep(POLL_SECONDS)
            before = (await gateway.branches()).total()
            await play(servers, 1, sessions)
            calls = (await gateway.branches()).total() - before


async def test_envoy_takes_a_gateway_out_that_says_that_it_is_ill_until_it_is_well(
    tmp_path: Path,
) -> None:
    async with (
        recording_gateway() as ill,
        recording_gateway() as well,
        envoy(tmp_path, ill.url, well.url) as front,
        ClientSession(raise_for_status=True) as client,
    ):

        async def came(keys: Sequence[str] = SESSIONS) -> list[str]:
            """Play a turn of sessions; return those that came to the first gateway."""
            forget(ill, well)
            for key in keys:
                async with client.post(front.url / CHAT, json=chat(key), headers={KEY: key}):
                    pass
            assert_keys(turns_of(ill, well))
            assert sorted([*served(ill), *served(well)]) == sorted(keys)
            return list(served(ill))

        async def until(wanted: Sequence[str]) -> None:
            """Play turns of one session, then of all, until exactly the ``wanted`` ones come."""
            for keys in (own[:1], SESSIONS):
                expected = [key for key in keys if key in wanted]
                while await came(keys) != expected:  # noqa: ASYNC110 - Envoy announces nothing
                    await asyncio.sleep(POLL_SECONDS)

        own = await came()
        assert own
        ill.answer = lambda call: failure() if call.path == "/health" else canned(call)
        await asyncio.wait_for(until([]), 60)
        ill.answer = canned
        await asyncio.wait_for(until(own), 60)


async def test_a_turn_that_a_gateway_dies_over_fails_and_is_sent_once(
    tmp_path: Path, balancer: Balancer
) -> None:
    """The engine may have computed the turn, so sending it again would compute it twice."""
    arrived = asyncio.Event()

    async def unanswered() -> AsyncGenerator[bytes, None]:
        arrived.set()
        await asyncio.Event().wait()
        yield b""

    async with (
        before_gateways(balancer, tmp_path, "consistent_hashing") as (behind, both, front),
        ClientSession(headers={KEY: "s-1"}, timeout=SILENCE) as client,
    ):

        async def turn() -> int:
            async with client.post(front.url / CHAT, json=chat("s-1")) as response:
                return response.status

        assert await turn() == 200
        [at] = (await front.gateways(1))["s-1"]
        for worker in behind:
            worker.answer = lambda call: (
                unanswered() if call.body and not arrived.is_set() else canned(call)
            )
        under_way = asyncio.create_task(turn())
        await asyncio.wait_for(arrived.wait(), 30)
        await kill(next(gateway for gateway in both if gateway.url == at))
        assert await under_way in (502, 503)
        assert served_with_keys(*behind)["s-1"].total() == 2
        assert await turn() == 200  # by the other gateway


Shared = tuple[list[Recorder], list[SmgGateway], Front]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[nginx, envoy])
async def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    """Run the workers, the gateways and a balancer for the tests that leave all of them well."""
    folder = tmp_path_factory.mktemp("shared")
    async with before_gateways(request.param, folder, "manual") as started:
        yield started


@pytest.mark.asyncio(loop_scope="module")
async def test_no_header_of_a_client_has_the_key_dropped_on_the_way(shared: Shared) -> None:
    """Envoy drops the headers that ``Connection`` names, as HTTP requires; nginx doesn't."""
    behind, both, front = shared
    forget(*behind)
    before = await branches(both)
    async with serve(pinned_server(front.url)) as server, ClientSession() as agent:
        url = server / f"sessions/s-1/{CHAT}"
        for named in (KEY, KEY.lower(), f"keep-alive, {KEY}", f"close , {KEY.upper()},x-a"):
            await answered(agent, url, json=chat("s-1"), headers={"Connection": named})
    # All on one worker, with the key.
    assert served_with_keys(*behind)["s-1"].most_common(1)[0][1] == 4
    assert await branches(both) - before == {"vacant": 1, "occupied_hit": 3}


@pytest.mark.asyncio(loop_scope="module")
async def test_calls_without_a_key_come_to_every_gateway(shared: Shared) -> None:
    """nginx takes turns. Envoy picks at random: all 40 on one gateway has a chance of 2 in 2⁴⁰."""
    _, both, front = shared
    async with ClientSession(raise_for_status=True) as client:
        for _ in range(40):
            async with client.post(front.url / CHAT, json=chat("s-1")) as response:
                await response.read()
    counts = [(await gateway.branches())["no_routing_id"] for gateway in both]
    least = 20 if front.in_turn else 1
    assert (sum(counts), min(counts) >= least) == (40, True), counts


def megabytes(session_id: str) -> BytesIO:
    """Return the body of a long turn, as a file, which aiohttp wants for that size."""
    turn = {**chat(session_id), "stream": True, "metadata": {"padding": "x" * 2**21}}
    return BytesIO(json.dumps(turn).encode())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_turn_of_megabytes_reaches_the_gateway_and_a_stream_comes_piece_by_piece(
    shared: Shared,
) -> None:
    """The front has its own limits and buffers."""
    behind, _, front = shared
    texts = [f"piece-{number}" for number in range(5)]
    seen = asyncio.Semaphore(1)

    async def one_by_one(call: Call) -> AsyncGenerator[bytes, None]:
        async for piece in stream(*texts):
            if b"piece-" in piece:
                await seen.acquire()  # the piece before has arrived
            yield piece

    for worker in behind:
        worker.answer = lambda call: one_by_one(call) if call.body else canned(call)
    read = b""
    try:
        async with (
            ClientSession(headers={**HEADERS, KEY: "s-2"}, timeout=SILENCE) as client,
            client.post(front.url / CHAT, data=megabytes("s-2")) as response,
        ):
            assert response.status == 200
            for text in texts:
                while text.encode() not in read:
                    read += await response.content.readany()
                seen.release()
    finally:
        for _ in texts:  # let the worker end if a piece did not arrive
            seen.release()
        for worker in behind:
            worker.answer = canned


async def test_a_turn_of_megabytes_for_a_gateway_that_is_gone_comes_to_the_other(
    tmp_path: Path, balancer: Balancer
) -> None:
    """The front must keep the body to send it again."""
    async with (
        before_gateways(balancer, tmp_path, "consistent_hashing") as (behind, (stops, _), front),
        ClientSession(headers=HEADERS, timeout=SILENCE) as client,
    ):
        await kill(stops)
        for key in SESSIONS[:16]:  # about half are for the gateway that is gone
            url = front.url / CHAT
            await answered(client, url, data=megabytes(key), headers={KEY: key})
        assert {sum(each.values()) for each in served_with_keys(*behind).values()} == {1}

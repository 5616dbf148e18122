"""The real gateway is killed during streams, and restarted with an empty sticky map."""

import asyncio

from aiohttp_smg_routing.testing import Recorder, free_port, smg_gateway
from harness.agents import Reply
from harness.processes import local_url
from harness.workers import recorders

from ..turns import assert_keys, turns_of
from .serving import SESSIONS, holding, watched_server


async def kill_and_restart(
    workers: list[Recorder], release: asyncio.Event, *, plugin: bool
) -> list[list[Reply]]:
    """Play five turns: the kill cuts off the second, and the third finds no gateway."""
    port = free_port()
    urls = [worker.url for worker in workers]
    gateway = local_url(port)
    async with watched_server(gateway, plugin=plugin, retries=1) as server:
        agents = server.agents
        async with smg_gateway(urls, policy="manual", port=port) as smg:
            turns = [await agents.all(1, stream=True)]
            async with agents.begun(2, stream=True) as under_way:
                smg.process.kill()
                await smg.process.wait()
            turns.append(await under_way)
        turns.append(await agents.all(3, stream=True))
        release.set()
        assert await agents.turns_kept() == dict.fromkeys(SESSIONS, 1)
        async with smg_gateway(urls, policy="manual", port=port) as smg:
            turns.append(await agents.all(4, stream=True))
            turns.append(await agents.all(5, stream=True))
            if plugin:  # each session is pinned anew, once
                pinned = len(SESSIONS)
                assert +await smg.branches() == {"vacant": pinned, "occupied_hit": pinned}
        if plugin:
            assert server.pinned == {each: agent.worker for each, agent in agents.by_id.items()}
        assert await agents.turns_kept() == dict.fromkeys(SESSIONS, 3)
    return [list(turn.values()) for turn in turns]


async def test_the_gateway_is_killed_in_the_midst_of_streams() -> None:
    outcomes = []
    for plugin in (True, False):
        async with recorders(3) as workers:
            with holding(*workers) as release:
                turns = await kill_and_restart(workers, release, plugin=plugin)
            assert_keys(turns_of(*workers), plugin=plugin)
        outcomes.append([[(got.status, got.whole) for got in turn] for turn in turns])
    assert outcomes[0] == outcomes[1]
    assert [set(turn) for turn in outcomes[0]] == [
        {(200, True)},
        {(200, False)},
        {(502, True)},
        {(200, True)},
        {(200, True)},
    ]

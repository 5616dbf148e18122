"""Session servers for two real gateways and four workers, and helpers to see who got what."""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import cycle, islice

from aiohttp import ClientSession, TCPConnector
from yarl import URL

from aiohttp_smg_routing.testing import Recorder, SmgGateway, free_port
from harness.agents import CHAT, chat
from harness.processes import answering, local_url, together
from harness.proxies import pinned_server
from harness.servers import serve

from ..turns import answered, assert_keys, served, turns_of

SERVERS, WORKERS = 3, 4
SESSIONS = [f"s-{number}" for number in range(48)]
AT_A_TIME = 15  # odd: an even number in lockstep would keep each session on one of two gateways


async def kill(gateway: SmgGateway) -> None:
    os.kill(gateway.process.pid, signal.SIGKILL)
    await gateway.process.wait()


@asynccontextmanager
async def session_servers(*told: URL, count: int = SERVERS) -> AsyncIterator[list[URL]]:
    """Run session servers in this process; assign them the URLs in ``told`` in turn."""
    assigned = islice(cycle(told), count)
    apps = [pinned_server(gateway, session_id="json:user") for gateway in assigned]
    async with together(map(serve, apps)) as started:
        yield started


@asynccontextmanager
async def server_process(gateway: URL, port: int | None = None) -> AsyncIterator[URL]:
    """Run one session server as a process."""
    url = local_url(port or free_port())
    argv = (sys.executable, "-m", "tests.recipes.pinned", str(gateway), "asyncio", str(url.port))
    async with answering(url, *argv):
        yield url


async def pid_of(server: URL) -> int:
    async with ClientSession() as client, client.get(server) as response:
        return int((await response.json())["pid"])


async def play(servers: Sequence[URL], turns: int, sessions: Iterable[str] = SESSIONS) -> None:
    """Play ``turns`` turns of each session, each through the next server."""
    limit = asyncio.Semaphore(AT_A_TIME)

    async def session(number: int, session_id: str) -> None:
        async with limit, ClientSession(connector=TCPConnector(force_close=True)) as agent:
            for turn in range(turns):
                server = servers[(number + turn) % len(servers)]
                await answered(agent, server / CHAT, json=chat(session_id, turn + 1))

    await asyncio.gather(*(session(*each) for each in enumerate(sessions)))


def served_with_keys(*workers: Recorder) -> Mapping[str, Counter[URL]]:
    """Return each session's number of turns by worker; each turn must have its session's key."""
    assert_keys(turns_of(*workers))
    return served(*workers)


def on_one_worker(workers: Sequence[Recorder], turns: int) -> bool:
    """Tell whether each session had all its turns on one worker."""
    came = served_with_keys(*workers)
    assert sorted(came) == sorted(SESSIONS)
    assert {sum(each.values()) for each in came.values()} == {turns}
    return all(len(each) == 1 for each in came.values())


async def branches(gateways: Sequence[SmgGateway]) -> Counter[str]:
    """Return the sum of the gateways' branch counters."""
    each = await asyncio.gather(*(gateway.branches() for gateway in gateways))
    return sum(each, Counter())

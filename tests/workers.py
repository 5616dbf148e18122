"""Workers behind the real gateway that can be killed: each a recorder in a process of its own.

python -m tests.workers PORT
"""

import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import (
    Call,
    Recorder,
    canned,
    child_process,
    completion,
    free_port,
    recording_gateway,
)

SMG = tuple(map(int, version("smg").split(".")[:2]))

names_workers = pytest.mark.skipif(SMG < (1, 10), reason="SMG names its workers from 1.10 on")


def chat(session_id: str, turn: int = 1) -> Mapping[str, object]:
    """Return the body of a turn: the conversation so far, and whose it is."""
    messages = [{"role": "user", "content": f"turn {number}"} for number in range(turn)]
    return {"model": "stub", "user": session_id, "messages": messages}


def answer_when_all_are_there(workers: Iterable[Recorder], count: int) -> None:
    """Have the workers answer no chat completion before ``count`` of them have arrived."""
    arrived, everybody = 0, asyncio.Event()

    async def late(call: Call) -> AsyncGenerator[bytes, None]:
        nonlocal arrived
        arrived += 1
        if arrived == count:
            everybody.set()
        await everybody.wait()
        yield completion()

    for worker in workers:
        worker.answer = lambda call: late(call) if call.method == "POST" else canned(call)


@asynccontextmanager
async def worker_processes(count: int) -> AsyncIterator[dict[URL, Process]]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession())
        processes = {}
        for _ in range(count):
            url = URL(f"http://127.0.0.1:{free_port()}")

            async def ready(url: URL = url) -> bool:
                async with session.get(url / "health") as response:
                    return response.ok

            argv = (sys.executable, "-m", "tests.workers", str(url.port))
            processes[url] = await stack.enter_async_context(child_process(*argv, ready=ready))
        yield processes


async def main(port: int) -> None:
    async with recording_gateway(port):
        await asyncio.Event().wait()  # until it is killed


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

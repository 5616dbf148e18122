"""The installed version of SMG, and a helper for tests with its workers."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from importlib.metadata import version

import pytest

from aiohttp_smg_routing.testing import Call, Recorder, canned, completion

SMG = tuple(map(int, version("smg").split(".")[:2]))

names_workers = pytest.mark.skipif(SMG < (1, 10), reason="SMG names its workers from 1.10 on")


def answer_when_all_are_there(workers: Iterable[Recorder], count: int) -> None:
    """Have the workers answer chat completions only once ``count`` of them have arrived."""
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

"""Wait with a time limit for an awaitable or a condition, or until a program answers."""

import asyncio
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from aiohttp import ClientSession
from yarl import URL

T = TypeVar("T")

PATIENCE_SECONDS = 60


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait for ``awaitable``; fail instead of hanging if it doesn't finish."""
    return await asyncio.wait_for(awaitable, PATIENCE_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Poll until ``condition`` holds, for conditions that no event announces."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while not condition():
        assert loop.time() < deadline, "the condition never held"
        await asyncio.sleep(0.01)


async def until_answered(url: URL, process: Process) -> None:
    """Wait until a program answers at ``url``, or has ended."""
    async with ClientSession() as session:
        while process.returncode is None:
            with suppress(OSError):
                async with session.get(url):
                    return
            await asyncio.sleep(0.05)

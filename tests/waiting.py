"""Waiting for what must happen: by an event, or by looking again and again, and never in vain."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 30


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait for what must happen; a test that waits in vain fails instead of hanging."""
    return await asyncio.wait_for(awaitable, PATIENCE_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Wait by polling until ``condition`` holds, if no event announces it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while not condition():
        assert loop.time() < deadline, "it has not come about"
        await asyncio.sleep(0.01)

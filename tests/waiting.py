"""Wait with a time limit: for an awaitable, or for a condition."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 30


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

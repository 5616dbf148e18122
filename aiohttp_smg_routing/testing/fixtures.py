"""The fixtures that pytest has where pytest-aiohttp is there."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest_asyncio

from . import Recorder, SmgGateway, StartSmgGateway
from . import recording_gateway as run_recording_gateway
from . import smg_gateway as run_smg_gateway


@pytest_asyncio.fixture
async def recording_gateway() -> AsyncIterator[Recorder]:
    """Run a gateway that keeps each call as raw lines, and answers what the test wants."""
    async with run_recording_gateway() as gateway:
        yield gateway


@pytest_asyncio.fixture
async def smg_gateway() -> AsyncIterator[StartSmgGateway]:
    """Give the function that starts the real gateway, which ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(*args: Any, **kwargs: Any) -> SmgGateway:
            return await stack.enter_async_context(run_smg_gateway(*args, **kwargs))

        yield start

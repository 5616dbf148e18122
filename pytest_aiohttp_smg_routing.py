"""The pytest fixtures ``recording_gateway`` and ``smg_gateway``, for tests of a server.

pytest loads this module in every run wherever the package is installed. So it stands beside the
package, and only a fixture imports the package: a run that asks for none is as fast as without it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp_smg_routing.testing import Recorder, SmgGateway, StartSmgGateway

try:
    from pytest_asyncio import fixture
except ImportError:  # pragma: no cover - there is none, or one of before 0.17
    pass
else:

    @fixture
    async def recording_gateway() -> AsyncIterator[Recorder]:
        """Run a gateway that keeps each call as raw lines, and answers what the test wants."""
        from aiohttp_smg_routing.testing import recording_gateway

        async with recording_gateway() as gateway:
            yield gateway

    @fixture
    async def smg_gateway() -> AsyncIterator[StartSmgGateway]:
        """Yield the function that starts the real gateway. The gateway ends with the test."""
        from aiohttp_smg_routing.testing import smg_gateway

        async with AsyncExitStack() as stack:

            async def start(*args: Any, **kwargs: Any) -> SmgGateway:
                return await stack.enter_async_context(smg_gateway(*args, **kwargs))

            yield start

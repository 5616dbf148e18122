"""Stand-ins for the servers behind a session server: an upstream, or workers for the gateway.

They run in another process, to leave the machine's time to the measured code.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from yarl import URL

from aiohttp_smg_routing.testing import free_ports
from harness.processes import answering, command, local_url
from harness.workers import models

from .stub import main


@dataclass(frozen=True, slots=True)
class Counted:
    """How many turns a worker received from one session; ``user`` is the session in the body."""

    worker: int
    user: str
    key: str | None
    turns: int


@dataclass(frozen=True, slots=True)
class Workers:
    """Stub workers, all in one child process."""

    urls: tuple[URL, ...]

    async def received(self) -> list[Counted]:
        """Return the turns that the workers received since the last call of this method."""
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.get(self.urls[0] / "received") as response,
        ):
            return [Counted(*line) for line in await response.json()]


@asynccontextmanager
async def upstream() -> AsyncIterator[URL]:
    """Run a stand-in for a gateway until the block ends; enter the block once it answers.

    It answers every POST with the same chat completion, and a header that names a worker.
    """
    async with _workers(1, record=False) as workers:
        yield workers.urls[0]


@asynccontextmanager
async def stub_workers(count: int) -> AsyncIterator[Workers]:
    """Run ``count`` workers for the real gateway; they record the session and key of each turn."""
    async with _workers(count, record=True) as workers:
        yield workers


@asynccontextmanager
async def _workers(count: int, *, record: bool) -> AsyncIterator[Workers]:
    ports = free_ports(count)
    urls = tuple(map(local_url, ports))
    argv = command(main, ports=ports, record=record, models=models())
    async with answering(urls[-1] / "health", *argv):
        yield Workers(urls)

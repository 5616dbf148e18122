from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Recorder, recording_gateway
from harness.proc import processes_in


@pytest.fixture(name="gateway")
def _gateway(recording_gateway: Recorder) -> Recorder:
    return recording_gateway


@pytest.fixture
async def elsewhere() -> AsyncIterator[Recorder]:
    async with recording_gateway() as recorder:
        yield recorder


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    """A client of the server under test, and of nothing else: it has no hook."""
    async with ClientSession() as session:
        yield session


@pytest.fixture
async def outgoing() -> AsyncIterator[ClientSession]:
    """What a server under test calls the gateway with, where the test attaches the hook."""
    async with ClientSession() as session:
        yield session


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder to run a program in; nothing may be at work in it afterwards."""
    yield tmp_path.resolve()
    assert processes_in(tmp_path.resolve()) == {}

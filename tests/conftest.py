import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Recorder, recording_gateway
from harness.proc import processes_in

# Each Python that imports aiohttp, and each client of httpx, reads the certificates of all
# authorities, which takes as long as the rest of the import. No test goes where they are asked for.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("authority.pem"))

# A shell has a job in the background ignore Ctrl-C, and nohup a hang-up. Programs would inherit it
# that the tests start, and end by a signal.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


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

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Recorder, recording_gateway
from harness.proc import processes_in

# Each import of aiohttp and each httpx client reads the certificates of all authorities, which
# doubles the time of the import. No test needs them.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("authority.pem"))

# They are the options of the commands, and a shell may have set some.
for variable in [name for name in os.environ if name.startswith("SMG_")]:
    del os.environ[variable]

# A shell makes background jobs ignore Ctrl-C, and nohup makes them ignore a hang-up. The programs
# that tests start and stop by a signal would inherit this.
for number, by_default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, by_default)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector what the collection makes, which stays until the end.

    The collector would search it again and again, which takes a tenth of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        if sys.version_info < (3, 14):  # there Hypothesis misses what refers to a random generator
            gc.freeze()
        gc.enable()


@pytest.fixture(name="gateway")
def _gateway(recording_gateway: Recorder) -> Recorder:
    return recording_gateway


@pytest.fixture
async def elsewhere() -> AsyncIterator[Recorder]:
    async with recording_gateway() as recorder:
        yield recorder


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    """A ClientSession without a hook, for calls to the server under test."""
    async with ClientSession() as session:
        yield session


@pytest.fixture
async def outgoing() -> AsyncIterator[ClientSession]:
    """A ClientSession for calls to the gateway; the test attaches the hook to it."""
    async with ClientSession() as session:
        yield session


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder to run a program in; no process may run in it afterwards."""
    yield tmp_path.resolve()
    assert processes_in(tmp_path.resolve()) == {}

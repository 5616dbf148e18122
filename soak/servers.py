"""The processes of a soak: workers that can be killed and restarted, and the session server."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import free_ports
from benchmarks.servers import child

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "examples" / "session_server.py"

T = TypeVar("T")


@dataclass(slots=True)
class Restartable(Generic[T]):
    """What can be killed, and run again where it was."""

    url: URL
    run: Callable[[], AbstractAsyncContextManager[T]]
    running: T = field(init=False)
    """What runs, or ran last."""

    up: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    down: list[list[float]] = field(default_factory=list, init=False)
    """Since when it was down, and until when."""

    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)

    @property
    def kills(self) -> int:
        """How often it was killed."""
        return len(self.down)

    async def start(self) -> None:
        """Run it; return once it answers."""
        self.running = await self._stack.enter_async_context(self.run())
        self.up.set()
        if self.down:
            self.down[-1][1] = time.monotonic()

    async def kill(self) -> None:
        """Kill it, if it runs."""
        if self.up.is_set():
            self.up.clear()
            self.down.append([time.monotonic(), float("inf")])
            await self._stack.aclose()

    def was_down(self, since: float, until: float) -> bool:
        """Tell whether it was killed, or was not yet back, at some moment of that time."""
        return any(begin <= until and end >= since for begin, end in self.down)


@asynccontextmanager
async def restartable(
    url: URL, run: Callable[[], AbstractAsyncContextManager[T]]
) -> AsyncIterator[Restartable[T]]:
    """Run it until the block ends."""
    it = Restartable(url, run)
    await it.start()
    try:
        yield it
    finally:
        await it.kill()


class Received(NamedTuple):
    """A turn as a worker received it."""

    user: str
    """The session that the body names."""

    text: str
    """The last message."""

    keys: list[str]
    fault: str | None
    at: float


@dataclass(slots=True)
class Worker:
    """A worker process on a port that stays its own."""

    port: int
    file: Path
    client: ClientSession
    seed: int = 0
    share: float = 0
    process: Restartable[Process] = field(init=False)

    def __post_init__(self) -> None:
        self.process = Restartable(self.url, self._run)

    @property
    def url(self) -> URL:
        """Where it answers."""
        return URL(f"http://127.0.0.1:{self.port}")

    def _run(self) -> AbstractAsyncContextManager[Process]:
        async def ready() -> bool:
            async with self.client.get(self.url / "health") as response:
                return response.ok

        spec = {"port": self.port, "file": str(self.file), "seed": self.seed, "share": self.share}
        self.seed += 1  # a restarted one does not fail at the same turns again
        return child("soak.worker", ready, **spec)

    async def start(self) -> None:
        """Run it; return once it answers."""
        await self.process.start()

    async def kill(self) -> None:
        """Kill it, if it runs."""
        await self.process.kill()

    def received(self) -> Iterator[Received]:
        """Yield the turns that it received, in all its lives."""
        with self.file.open(encoding="utf-8") as lines:
            for line in lines:
                yield Received(*json.loads(line))


@asynccontextmanager
async def worker_processes(
    folder: Path, count: int, *, seed: int = 0, share: float = 0
) -> AsyncIterator[Sequence[Worker]]:
    """Run workers until the block ends; they note what they receive in ``folder``."""
    async with ClientSession() as client:
        workers = []
        for port in free_ports(count):
            file = folder / f"received-{port}.jsonl"
            file.touch()
            workers.append(Worker(port, file, client, seed * 1000 + port, share))
        try:
            await asyncio.gather(*(worker.start() for worker in workers))
            yield workers
        finally:
            await asyncio.gather(*(worker.kill() for worker in workers))


@dataclass(frozen=True, slots=True)
class SessionServer:
    """The example session server, as a process."""

    url: URL
    process: Process
    log: Path

    async def stop(self) -> int:
        """Have it end by SIGTERM; return its exit status."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        return await self.process.wait()

    def memory(self) -> int | None:
        """Return the bytes of memory that it holds, None where the system does not tell."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except OSError:
            return None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int | None:
        """Return how many files and sockets it has open, None where the system does not tell."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        except OSError:
            return None


@asynccontextmanager
async def session_server(
    folder: Path,
    gateway: URL,
    *,
    port: int = 0,
    timeout_seconds: float = 60,
    env: Mapping[str, str],
    **config: object,
) -> AsyncIterator[SessionServer]:
    """Run the example before ``gateway`` until the block ends; its log and settings are files.

    ``config`` is further config of the plugin; a JSON value is a TOML one too.
    """
    settings, log = folder / "settings.toml", folder / "server.log"
    config = {"gateway": str(gateway), "client_session": "client_session", **config}
    text = f"""\
server.port = {port}
gateway.url = {json.dumps(str(gateway))}
gateway.timeout_seconds = {timeout_seconds}
[smg_routing]
"""
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    settings.write_text(text, encoding="utf-8")
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", str(PROGRAM), str(settings)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=output,
            # The plugin of this tree, whichever is installed: it is what the soak speaks of.
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            cwd=folder,  # what it leaves behind, a process or a file, is found there
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the session server did not start:\n{log.read_text()[-4000:]}")
        yield SessionServer(URL(line.split()[-1]), process, log)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.communicate()


COMPLAINTS = (
    "Traceback",
    "never awaited",
    "was never retrieved",
    "Task was destroyed",
    "Unclosed",
    "ResourceWarning",
    "Exception ignored",
)


def complaints(log: Path) -> list[str]:
    """Return the lines of a log that tell of a mistake in the server, the plugin or aiohttp."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        return [line.rstrip() for line in lines if any(text in line for text in COMPLAINTS)]

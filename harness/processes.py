"""Programs as child processes: run until a block ends, or killed and run again."""

import asyncio
import json
import os
import subprocess
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import child_process

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

CLI = (sys.executable, "-m", "aiohttp_smg_routing")
"""The package's command line: ``verify``, ``watch`` or ``run`` follows."""

T = TypeVar("T")


def local_url(port: int) -> URL:
    """Return the URL of a loopback port."""
    return URL(f"http://127.0.0.1:{port}")


def command(main: Callable[..., None], **arguments: object) -> tuple[str, ...]:
    """Return the command line that calls a function in a process of its own.

    The arguments travel as JSON. The child finds the module where this process did: in the folder
    that it was started in, or by ``PYTHONPATH``.
    """
    function = (main.__module__, main.__qualname__)
    return (sys.executable, "-m", "harness.child", *function, json.dumps(arguments))


@asynccontextmanager
async def answering(url: URL, *argv: str) -> AsyncIterator[Process]:
    """Run a program until the block ends; enter the block once it answers at ``url``.

    A status of 500 or more is not an answer: an engine that loads its model gives 503.
    """
    async with ClientSession() as client:

        async def ready() -> bool:
            async with client.get(url) as response:
                return response.status < 500

        async with child_process(*argv, ready=ready) as process:
            yield process


@asynccontextmanager
async def together(contexts: Iterable[AbstractAsyncContextManager[T]]) -> AsyncIterator[list[T]]:
    """Enter contexts side by side, and leave them at the end of the block.

    If one fails, wait for the others first: one that started later would be left running.
    """
    async with AsyncExitStack() as stack:
        starts = map(stack.enter_async_context, contexts)
        entered = []
        for outcome in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
            entered.append(outcome)
        yield entered


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which Python finds the modules of this checkout in any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def finished(
    folder: Path, *argv: str, env: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program in ``folder`` to its end; return its status and what it printed."""
    given = environment(**(env or {}))
    return subprocess.run(argv, cwd=folder, env=given, capture_output=True, text=True, **options)  # noqa: S603


@asynccontextmanager
async def running(folder: Path, *argv: str, **env: str) -> AsyncIterator[Process]:
    """Run Python in ``folder``, which also has its temporary files, with pipes for its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *argv,
        cwd=folder,
        env=environment(**{"TMPDIR": str(folder), "FORCE_COLOR": "1", **env}),
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@dataclass(slots=True)
class Restartable(Generic[T]):
    """Something that can be killed, and run again in the same place."""

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

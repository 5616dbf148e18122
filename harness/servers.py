"""Servers: an app in this process, and the example session server as a process of its own."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aiohttp import web
from yarl import URL

from . import proc
from .processes import ROOT, environment

PROGRAM = ROOT / "examples" / "session_server.py"


@asynccontextmanager
async def serve(app: web.Application, port: int = 0, **options: Any) -> AsyncIterator[URL]:
    """Run ``app`` in this process until the block ends, on a free loopback port unless given.

    ``options`` are those of ``web.AppRunner``.
    """
    runner = web.AppRunner(app, **{"access_log": None, "shutdown_timeout": 1, **options})
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        yield URL(f"http://{host}:{port}")
    finally:
        await runner.cleanup()


@dataclass(frozen=True, slots=True)
class SessionServer:
    """The example session server, as a process."""

    url: URL
    process: Process
    log: Path

    async def stop(self) -> int:
        """End the server by SIGTERM; return its exit status."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        return await self.process.wait()

    def memory(self) -> int | None:
        """Return the bytes of memory that it holds, None if the system does not tell."""
        return proc.memory(self.process.pid)

    def descriptors(self) -> int | None:
        """Return how many files and sockets it has open, None if the system does not tell."""
        return proc.descriptors(self.process.pid)


@asynccontextmanager
async def session_server(
    gateway: URL,
    *,
    folder: Path | None = None,
    calls: URL | None = None,
    port: int = 0,
    timeout_seconds: float = 60,
    env: Mapping[str, str] = MappingProxyType({}),
    **config: object,
) -> AsyncIterator[SessionServer]:
    """Run the example in front of ``gateway`` until the block ends.

    Its settings, its log and its other files are in ``folder``, by default a temporary one.
    ``calls`` is the gateway that it calls, if the plugin's config must name another one.
    ``config`` is further config of the plugin, such as ``enabled``. Raises ``RuntimeError`` with
    the end of its log if it does not start.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="server-")))
        settings, log = folder / "settings.toml", folder / "server.log"
        write_settings(
            settings,
            server={"port": port},
            gateway={"url": str(calls or gateway), "timeout_seconds": timeout_seconds},
            smg_routing={"gateway": str(gateway), "client_session": "client_session", **config},
        )
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(PROGRAM), str(settings)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=output,
                # The plugin of this checkout, even if another is installed: it is under test.
                env=environment(**env),
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


def write_settings(file: Path, **tables: Mapping[str, object]) -> None:
    """Write a TOML file. Every JSON value except null is also a TOML value."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    """Return the lines of a log that show a mistake in the server, the plugin or aiohttp."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        return [line.rstrip() for line in lines if any(text in line for text in COMPLAINTS)]

"""Programs that are run for real in a folder of their own, and what they leave at work there."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from yarl import URL

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "cwd").exists()


def processes_in(folder: Path) -> dict[int, str]:
    """Return what runs in ``folder``, or below: a child starts where its parent is.

    A process that a dead parent left behind is found too. Empty where there is no ``/proc``.
    """
    found = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it ended just now, or is somebody else's
            if (process / "cwd").readlink().is_relative_to(folder):
                found[int(process.name)] = (process / "cmdline").read_bytes().decode()
    return found


def open_files() -> list[str]:
    """Return what this process has open, but for sockets; empty where there is no ``/proc``."""
    return [name for _, name in _descriptors() if not name.startswith("socket:")]


def connections_to(*ports: int | None) -> int:
    """Return how many connections to these ports this process has open; 0 without ``/proc``."""
    found = 0
    for number, name in _descriptors():
        if name.startswith("socket:"):
            with (
                suppress(OSError),  # it is no connection, or one that has ended
                socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as opened,
            ):
                peer = opened.getpeername()
                found += isinstance(peer, tuple) and peer[1] in ports
    return found


def _descriptors() -> Iterator[tuple[int, str]]:
    for descriptor in (PROC / "self" / "fd").glob("*"):
        with suppress(OSError):  # the one that reads this very folder is closed by now
            yield int(descriptor.name), str(descriptor.readlink())


@asynccontextmanager
async def running(folder: Path, *argv: str, **env: str) -> AsyncIterator[Process]:
    """Run Python in ``folder``, which has its temporary files too, with pipes for what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *argv,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "FORCE_COLOR": "1", **env},
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@contextmanager
def held_port(port: int | None = None) -> Iterator[int]:
    """Keep a loopback port for a server of ours, before it starts and after it died.

    Linux gives such a port to nobody who takes any port, and lets in who asks for this one. Other
    systems let in nobody, so there it is only looked for.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", port or 0))
        found: int = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield found


async def until_refused(url: URL) -> None:
    """Return when nobody listens at ``url`` any more.

    It is not asked by a connection: one that a server has not come to when it closes is one that it
    never closes, and it is complained of.
    """
    while True:
        with suppress(OSError), socket.socket() as probe:
            # Beside connections of the port there may be another socket, beside a listener not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((url.host, url.port))
            return
        await asyncio.sleep(0.01)

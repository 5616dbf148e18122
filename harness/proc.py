"""What processes run, and what they have open, as the system tells, mostly in ``/proc``."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from yarl import URL

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "cwd").exists()


def processes_in(folder: Path) -> dict[int, str]:
    """Return the processes in ``folder`` or below: a child starts where its parent is.

    A process that a dead parent left behind is found too. Empty without ``/proc``.
    """
    found = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it ended just now, or is somebody else's
            if (process / "cwd").readlink().is_relative_to(folder):
                found[int(process.name)] = (process / "cmdline").read_bytes().decode()
    return found


def memory(pid: int) -> int | None:
    """Return the bytes of memory that a process holds, None if the system does not tell."""
    try:
        pages = (PROC / str(pid) / "statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int | None:
    """Return how many files and sockets a process has open, None if the system does not tell."""
    try:
        return len(os.listdir(PROC / str(pid) / "fd"))
    except OSError:
        return None


def open_files() -> list[str]:
    """Return what this process has open, except sockets; empty without ``/proc``."""
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


async def until_refused(url: URL) -> None:
    """Return when nobody listens at ``url`` any more.

    It opens no connection: a server that closes before it accepts one never closes that connection,
    and a warning about it would follow.
    """
    while True:
        with suppress(OSError), socket.socket() as probe:
            # A socket can bind beside connections of the port, but not beside a listener.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((url.host, url.port))
            return
        await asyncio.sleep(0.01)

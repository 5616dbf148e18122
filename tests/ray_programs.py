"""Programs that have a Ray cluster of their own, which ends with their standard input."""

import os
import secrets
import signal
import sys
from asyncio import create_subprocess_exec
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from harness.proc import processes_in

# Without it Ray finds the machine's own address, and listens there.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def options(folder: str, processors: int) -> dict[str, Any]:
    """Return what ``ray.init()`` takes for a small cluster on loopback, with its files in a folder.

    Ray has sockets in that folder, and their paths must be short.
    """
    return {
        "address": "local",
        "num_cpus": processors,
        "object_store_memory": 80 * 2**20,  # bytes: the least that it takes
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }


@asynccontextmanager
async def ray_program(
    folder: Path, *argv: str, env: Mapping[str, str], stdout: int = PIPE
) -> AsyncIterator[Process]:
    """Run Python in ``folder`` until the block ends; nothing is left of it."""
    environ = {
        **{name: text for name, text in os.environ.items() if not name.startswith("RAY_")},
        **LOOPBACK,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or it makes one, and keeps it in the home
        **env,
    }
    with (folder / "log").open("wb") as log:
        process = await create_subprocess_exec(
            *(sys.executable, *argv), cwd=folder, env=environ, stdin=PIPE, stdout=stdout, stderr=log
        )
    try:
        yield process
        await process.communicate(b"")  # its standard input ends, and so does Ray
        left = processes_in(folder)
    finally:
        for pid in {process.pid, *processes_in(folder)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()
    assert left == {}

"""Programs with their own Ray cluster, which ends when their standard input does."""

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

# Without this, Ray listens on the machine's external address.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def options(folder: str, processors: int) -> dict[str, Any]:
    """Return the arguments of ``ray.init()`` for a small loopback cluster with files in a folder.

    Ray puts sockets into that folder, and their paths must be short.
    """
    return {
        "address": "local",
        "num_cpus": processors,
        "object_store_memory": 80 * 2**20,  # bytes; Ray accepts no less
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }


@asynccontextmanager
async def ray_program(
    folder: Path, *argv: str, env: Mapping[str, str], stdout: int = PIPE
) -> AsyncIterator[Process]:
    """Run Python in ``folder`` until the block ends; leave nothing behind."""
    environ = {
        **{name: text for name, text in os.environ.items() if not name.startswith("RAY_")},
        **LOOPBACK,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray saves one in the home folder
        **env,
    }
    with (folder / "log").open("wb") as log:
        process = await create_subprocess_exec(
            *(sys.executable, *argv), cwd=folder, env=environ, stdin=PIPE, stdout=stdout, stderr=log
        )
    try:
        yield process
        await process.communicate(b"")  # ends its standard input, and so Ray
        left = processes_in(folder)
    finally:
        for pid in {process.pid, *processes_in(folder)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()
    assert left == {}

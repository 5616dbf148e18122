"""The session servers as Ray actors, as docs/scaling.md recommends."""

import asyncio
import json
import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from yarl import URL

from harness.proc import HAS_PROC, processes_in
from harness.processes import ROOT

from ..programs import absent
from ..ray_programs import ray_program
from .cluster import SERVERS, on_one_worker, pid_of, play
from .front import before_gateways, instead, on_the_page
from .nginx import nginx

TURNS = 3


@asynccontextmanager
async def ray_cluster(folder: Path, gateway: URL) -> AsyncIterator[Process]:
    """Run a cluster of session servers in ``folder``; leave nothing behind after the block."""
    actor = ("from server import make_app", "from tests.recipes.pinned import make_app")
    (folder / "actor.py").write_text(instead(on_the_page("python"), actor))
    env = {"GATEWAY": str(gateway), "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    argv = ("-m", "tests.scale.ray_cluster", str(folder), str(SERVERS))
    async with ray_program(folder, *argv, env=env) as process:
        yield process


async def addresses(process: Process) -> list[URL]:
    """Read the addresses that the cluster prints next, among Ray's own messages."""
    assert process.stdout is not None
    while line := await asyncio.wait_for(process.stdout.readline(), 120):
        if line.startswith(b"["):
            return [URL(url) for url in json.loads(line)]
    raise AssertionError("see the log in its folder")


async def test_ray_actors_keep_their_sessions_and_so_does_one_that_ray_made_again(
    tmp_path: Path,
) -> None:
    if find_spec("ray") is None:
        absent("Ray is not installed: pip install -e . --group scale")
    # Ray puts sockets into its folder, and their paths must be short.
    with TemporaryDirectory(prefix="ray-") as folder:
        async with (
            before_gateways(nginx, tmp_path, "manual") as (behind, _, front),
            ray_cluster(Path(folder), front.url) as cluster,
        ):
            servers = await addresses(cluster)
            await play(servers, TURNS)
            pids = [await pid_of(server) for server in servers]
            assert not HAS_PROC or set(pids) < set(processes_in(Path(folder)))

            os.kill(pids[0], signal.SIGKILL)
            assert cluster.stdin is not None
            cluster.stdin.write(b"again\n")
            again = await addresses(cluster)
            assert (again[0] != servers[0], again[1:]) == (True, servers[1:])
            assert await pid_of(again[0]) != pids[0]
            await play(again, TURNS)

        assert on_one_worker(behind, 2 * TURNS)
